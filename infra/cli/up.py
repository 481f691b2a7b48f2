"""``./claw up``: starts what is not running, waits until each part really works."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.cli.home import Home, home_folder
from infra.cli.ports import check_ports
from infra.cli.privileges import leave_root
from infra.engines import CREDENTIALS, ENGINES
from infra.engines.base import Engine, EngineError, Place
from infra.engines.supervisor import Supervisor

_READY_SECONDS = 120
console = Console(stderr=True, highlight=False)


def up(only: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "") -> None:
    """Start the stack, or what is missing of it; return when everything is ready."""
    leave_root()
    names = only.split(",") if only else list(ENGINES)
    for name in names:
        if name not in ENGINES:
            raise EngineError(f"--only: {name!r} is none of {', '.join(ENGINES)}")
    home = Home(home_folder())
    place = home.place()
    # The clients would tell of every refused connection, the ordinary thing while an engine starts.
    logging.disable()
    with alone(home.path):
        asyncio.run(_start_all(home, place, [ENGINES[name] for name in names]))


async def _start_all(home: Home, place: Place, engines: list[Engine]) -> None:
    began = time.monotonic()
    console.print(f"Starting {len(engines)} engines; their state is in {home.path}.")
    supervisor = Supervisor(home.path)
    supervisor.start()
    running = [name for name, process in supervisor.processes().items() if process.pid]
    check_ports(place, [engine for engine in engines if engine.NAME not in running])
    outcomes = await asyncio.gather(*(_start(supervisor, place, engine) for engine in engines), return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if not isinstance(failure, EngineError):
            raise failure
        console.print(f"[red]✗[/] {failure}", soft_wrap=True)
    if failures:
        raise EngineError(f"{len(failures)} of {len(engines)} engines did not start")
    home.write_credentials(place, {CREDENTIALS[engine.NAME]: engine.access(place) for engine in engines})
    console.print(f"Ready after {time.monotonic() - began:.1f} s.")


async def _start(supervisor: Supervisor, place: Place, engine: Engine) -> None:
    began = time.monotonic()
    if not (already := _is_running(supervisor, engine.NAME)):
        await asyncio.to_thread(engine.install)
        await asyncio.to_thread(engine.prepare, place)
        place.folder(engine.NAME)
        supervisor.add(engine.NAME, engine.program(place))
    version = await wait_ready(supervisor, place, engine)
    took = "was running" if already else f"ready in {time.monotonic() - began:.1f} s"
    port = place.ports[next(iter(engine.PORTS))]
    console.print(f"[green]✓[/] {engine.NAME:<11} {version:<9} 127.0.0.1:{port:<6} {took}")


async def wait_ready(supervisor: Supervisor, place: Place, engine: Engine) -> str:
    """Waits until the engine answers and returns its version.

    Raises EngineError, with the end of its log, if it gave up or does not answer in two minutes.
    """
    deadline = time.monotonic() + _READY_SECONDS
    restarts_before = supervisor.processes()[engine.NAME].restarts
    while True:
        try:
            async with asyncio.timeout(10):
                return await engine.ready(place)
        except Exception as error:
            restarts = supervisor.processes()[engine.NAME].restarts - restarts_before
            if restarts > 3 or time.monotonic() > deadline:
                reason = "ends again and again" if restarts > 3 else f"does not answer ({error!r})"
                tail = last_lines(supervisor.log(engine.NAME), 8)
                raise EngineError(f"{engine.NAME} {reason}. `./claw logs {engine.NAME}` ends with:\n{tail}") from error
        await asyncio.sleep(0.2)


def last_lines(path: Path, count: int) -> str:
    """The end of a text file; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])


def _is_running(supervisor: Supervisor, name: str) -> bool:
    process = supervisor.processes().get(name)
    return process is not None and process.state in ("RUNNING", "STARTING", "BACKOFF")


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Two commands that start or stop the same stack take turns. A killed one leaves no lock behind."""
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Waiting for another `./claw up` or `down` of this stack.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
