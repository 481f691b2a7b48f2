"""Runs nginx, the gateway, alone in front of services or fakes of them."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import httpx

from protos.catalog import SERVICES
from tooling.stack.engines import nginx
from tooling.stack.engines.base import Place, Secrets
from tooling.stack.engines.nginx import LOCAL_LIMITS, Limits, Tls
from tooling.testing.stack import free_port

READY_SECONDS = 30.0


@asynccontextmanager
async def running_gateway(
    ports: Mapping[str, int], limits: Limits = LOCAL_LIMITS, tls: Tls | None = None
) -> AsyncIterator[str]:
    """Yields the gateway's base URL, the one without TLS. `ports`: HTTP port of each service."""
    # Directly under /tmp: if root starts nginx, its workers run as a user who may not enter TMPDIR.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="claw-nginx-") as folder:
        place = Place(Path(folder), {**ports, "nginx": free_port()}, Secrets(Path(folder) / "secrets.json"), SERVICES)
        nginx.prepare(place, limits, tls)
        as_root = ("-g", "user root;") if os.geteuid() == 0 else ()
        process = await asyncio.create_subprocess_exec(*nginx.program(place).command, *as_root)
        try:
            async with asyncio.timeout(READY_SECONDS):
                while not await _answers(place):  # noqa: ASYNC110 - another process has no signal for it
                    await asyncio.sleep(0.05)
            yield nginx.access(place)["url"]
        finally:
            process.terminate()
            await process.wait()


async def _answers(place: Place) -> bool:
    try:
        return bool(await nginx.ready(place))
    except httpx.HTTPError:
        return False
