"""The erasure of a tenant: its files and its vectors outside of the database."""

from __future__ import annotations

from infra.lanes.effects import Effects
from infra.service.service import Runtime
from infra.service.tenant_erasure import Before, EraseTenant
from services.memory import adapters
from services.memory.handlers import DOCUMENTS

FILES = 1_000
"""Paths that are read at once."""


def delete_outside(runtime: Runtime) -> Before:
    objects, index = adapters.objects(runtime), adapters.index(runtime)

    async def delete(item: EraseTenant, effects: Effects) -> None:
        paths = [""]
        while paths:
            async with effects.begin() as tx:
                rows = await tx.sql(
                    """
                    SELECT path
                    FROM (
                        SELECT path FROM document WHERE tenant_id = $1
                        UNION
                        -- files of replaced versions that are not deleted yet
                        SELECT convert_from(body, 'UTF8')::jsonb ->> 'path'
                        FROM lane_item
                        WHERE tenant_id = $1 AND kind = $2 AND state = 'waiting'
                    ) AS file
                    WHERE path > $3
                    ORDER BY path
                    LIMIT $4
                    """,
                    item.tenant_id,
                    DOCUMENTS.name,
                    paths[-1],
                    FILES,
                )
            paths = [path for (path,) in rows]
            for path in paths:
                await objects.delete(path)
        await index.remove_tenant(item.tenant_id)

    return delete
