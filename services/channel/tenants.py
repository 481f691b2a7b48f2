"""The erasure of a tenant: the files that people sent to its channels."""

from __future__ import annotations

from infra.lanes.effects import Effects
from infra.service.service import Runtime
from infra.service.tenant_erasure import Before, EraseTenant
from services.channel.attachments import stored_objects

FILES = 1_000
"""Paths that are read at once."""


def delete_files(runtime: Runtime) -> Before:
    objects = stored_objects(runtime)

    async def delete(item: EraseTenant, effects: Effects) -> None:
        paths = [""]
        while paths:
            async with effects.begin() as tx:
                rows = await tx.sql(
                    "SELECT path FROM attachment WHERE tenant_id = $1 AND path > $2 ORDER BY path LIMIT $3",
                    item.tenant_id,
                    paths[-1],
                    FILES,
                )
            paths = [path for (path,) in rows]
            for path in paths:
                await objects.delete(path)

    return delete
