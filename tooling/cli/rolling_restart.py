"""``./claw rolling-restart``: replaces the processes of services while the stack serves its clients."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from tooling.cli.output import Json, print_json
from tooling.cli.up import console, one_command_at_a_time, wait_ready
from tooling.stack.engines import nginx
from tooling.stack.engines.base import EngineError, Place, write_atomically
from tooling.stack.home import SERVICES, Home, home_folder
from tooling.stack.provision import provision
from tooling.stack.services import LocalService
from tooling.stack.supervisor import Supervisor

# The gateway is last: it leads clients to a new route when the services have it.
_NAMES = (*SERVICES, nginx.NAME)


def rolling_restart(
    service: Annotated[str, typer.Argument(help="The service, or nginx. Default: all, one after the other.")] = "",
    as_json: Json = False,
) -> None:
    """Restart services without a refused request: a second process serves while the first one is replaced.

    Migrates the database first, so that after a change of the code the services run the new code.
    The gateway reads its new configuration and does not restart.
    """
    if service and service not in _NAMES:
        raise EngineError(f"SERVICE: {service!r} must be one of {', '.join(_NAMES)}")
    home = Home(home_folder())
    supervisor = Supervisor(home.path)
    names = [service] if service else _NAMES
    running = supervisor.processes()
    if stopped := [name for name in names if name not in running or not running[name].pid]:
        raise EngineError(f"{', '.join(stopped)}: not running. Start the stack with ./claw up")
    with one_command_at_a_time(home.path):
        asyncio.run(_replace_all(supervisor, home.place(), names))
    if as_json:
        print_json({"restarted": names})


async def _replace_all(supervisor: Supervisor, place: Place, names: Sequence[str]) -> None:
    if set(names) & set(SERVICES):
        await provision(place)
    for name in names:
        began = time.monotonic()
        if name == nginx.NAME:
            _reload_gateway(supervisor, place)
            console.print(f"[green]✓[/] {name:<14} has its new configuration")
            continue
        await replace(supervisor, place, LocalService(name))
        console.print(f"[green]✓[/] {name:<14} replaced after {time.monotonic() - began:.1f} s")


def _reload_gateway(supervisor: Supervisor, place: Place) -> None:
    """Writes the gateway's configuration, and lets its running process read it. Raises EngineError if it is wrong."""
    file = place.folder(nginx.NAME) / "nginx.conf"
    old = file.read_text()
    nginx.prepare(place)
    tested = subprocess.run([*nginx.program(place).command, "-t"], capture_output=True, text=True, check=False)
    if tested.returncode:
        # Otherwise the next restart of nginx would fail.
        write_atomically(file, old)
        raise EngineError(f"the gateway goes on with its old configuration, the new one has an error: {tested.stderr}")
    os.kill(supervisor.processes()[nginx.NAME].pid, signal.SIGHUP)


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
