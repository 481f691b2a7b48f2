"""The erasure of a tenant: its files and its vectors outside of the database."""

from __future__ import annotations

from infra.lanes.effects import Effects
from infra.service.service import Runtime
from infra.service.tenant_erasure import Before, EraseTenant, delete_files
from services.memory import adapters
from services.memory.lanes import DOCUMENTS

_FILES = """
    SELECT path
    FROM (
        SELECT path FROM document WHERE tenant_id = $1
        UNION
        -- files of replaced versions that are not deleted yet
        SELECT convert_from(body, 'UTF8')::jsonb ->> 'path'
        FROM lane_item
        WHERE tenant_id = $1 AND kind = $4 AND state = 'waiting'
    ) AS file
    WHERE path > $2
    ORDER BY path
    LIMIT $3
"""


def delete_outside(runtime: Runtime) -> Before:
    objects, index = adapters.objects(runtime), adapters.index(runtime)

    async def delete(item: EraseTenant, effects: Effects) -> None:
        await delete_files(objects, effects, _FILES, item.tenant_id, DOCUMENTS.name)
        await index.remove_tenant(item.tenant_id)

    return delete
