"""The erasure of a tenant: the files that people sent to its channels."""

from __future__ import annotations

from infra.lanes.effects import Effects
from infra.service import tenant_erasure
from infra.service.service import Runtime
from infra.service.tenant_erasure import Before, EraseTenant
from services.channel.files.attachments import stored_objects

_FILES = "SELECT path FROM attachment WHERE tenant_id = $1 AND path > $2 ORDER BY path LIMIT $3"


def delete_files(runtime: Runtime) -> Before:
    objects = stored_objects(runtime)

    async def delete(item: EraseTenant, effects: Effects) -> None:
        await tenant_erasure.delete_files(objects, effects, _FILES, item.tenant_id)

    return delete
