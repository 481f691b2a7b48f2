"""Imported last by the fork server of `tooling.testing.processes`.

Imports what services import only after their start, and freezes all objects: the garbage collection at the start of
each fork would otherwise read, and thereby copy, the memory of every module.
"""

from __future__ import annotations

from importlib import import_module

from infra.service.service import freeze_loaded_modules

for _name in (
    "anyio._backends._asyncio",
    "pydantic.v1",
    "services.agent.models.claude",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "uvicorn.lifespan.off",
    "valkey.asyncio",
):
    import_module(_name)
freeze_loaded_modules()
