"""Imported last by the fork server of `tooling.testing.processes`.

Imports the modules that services import only after their start. Then freezes all objects: otherwise the garbage
collection at the start of each fork would read, and so copy, the memory of every module.
"""

from __future__ import annotations

from importlib import import_module

from infra.service.process import freeze_loaded_modules

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
