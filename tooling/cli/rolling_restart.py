"""``./claw rolling-restart``: replaces the processes of services while the stack serves its clients."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import typer

from tooling.cli.up import alone, console, wait_ready
from tooling.stack.engines.base import EngineError, Place
from tooling.stack.home import SERVICES, Home, home_folder
from tooling.stack.provision import provision
from tooling.stack.services import LocalService
from tooling.stack.supervisor import Supervisor


def rolling_restart(
    service: Annotated[str, typer.Argument(help="The service. Default: all, one after the other.")] = "",
) -> None:
    """Restart services without a refused request: a second process serves while the first one is replaced.

    Migrates the database first, so that after a change of the code the services run the new code.
    """
    if service and service not in SERVICES:
        raise EngineError(f"SERVICE: {service!r} must be one of {', '.join(SERVICES)}")
    home = Home(home_folder())
    supervisor = Supervisor(home.path)
    names = [service] if service else SERVICES
    running = supervisor.processes()
    if stopped := [name for name in names if name not in running or not running[name].pid]:
        raise EngineError(f"{', '.join(stopped)}: not running. Start the stack with ./claw up")
    with alone(home.path):
        asyncio.run(_replace_all(supervisor, home.place(), [LocalService(name) for name in names]))


async def _replace_all(supervisor: Supervisor, place: Place, services: list[LocalService]) -> None:
    await provision(place)
    for service in services:
        began = time.monotonic()
        await replace(supervisor, place, service)
        console.print(f"[green]✓[/] {service.NAME:<14} replaced after {time.monotonic() - began:.1f} s")


async def replace(supervisor: Supervisor, place: Place, service: LocalService) -> None:
    """Starts a second process of the service on the same ports, restarts the first one, and ends the second one.

    If it is interrupted, the second process goes on to serve; the next call ends it.
    """
    second = f"{service.NAME}.second"
    service.prepare(place)
    program = service.program(place)
    try:
        supervisor.add(second, program)
        await _wait(supervisor, place, service, second)
    except EngineError:
        supervisor.remove(second)
        raise
    supervisor.restart(service.NAME, program)
    await _wait(supervisor, place, service, service.NAME)
    supervisor.remove(second)


async def _wait(supervisor: Supervisor, place: Place, service: LocalService, name: str) -> None:
    """Waits until this process of the service is ready. Raises EngineError."""

    async def ready() -> str:
        version, process = await service.ready_process(place)
        if process != supervisor.processes()[name].pid:
            raise EngineError("only another process of the service answers")
        return version

    await wait_ready(supervisor, name, place.ports[service.NAME], ready)
