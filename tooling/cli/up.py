"""``./claw up``: starts what is not running, waits until each part really works."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tooling.stack.engines import CREDENTIALS, ENGINES
from tooling.stack.engines.base import Engine, EngineError, Place
from tooling.stack.home import Home, home_folder
from tooling.stack.machine import check_access, check_machine
from tooling.stack.ports import check_ports
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor

# A busy machine may take minutes to load nine services at once; what has ended again and again is given up before.
_READY_SECONDS = 300
_STILL_WAITING_SECONDS = 30
console = Console(stderr=True, highlight=False)


def up(only: Annotated[str, typer.Option(help="Only these, separated by commas.")] = "") -> None:
    """Start the stack, or what is missing of it; return when everything is ready."""
    known = parts()
    names = only.split(",") if only else list(known)
    for name in names:
        if name not in known:
            raise EngineError(f"--only: {name!r} is none of {', '.join(known)}")
    home = Home(home_folder())
    check_access(home.path)
    place = home.place()
    # The clients would tell of every refused connection, the ordinary thing while an engine starts.
    logging.disable()
    with alone(home.path):
        asyncio.run(_start_all(home, place, [known[name] for name in names]))


async def _start_all(home: Home, place: Place, wanted: list[Engine]) -> None:
    began = time.monotonic()
    console.print(f"Starting {', '.join(part.NAME for part in wanted)}. State: {home.path}")
    check_machine(home.path)
    supervisor = Supervisor(home.path)
    supervisor.start()
    running = [name for name, process in supervisor.processes().items() if process.pid]
    check_ports(place, [part for part in wanted if part.NAME not in running])
    engines = [part for part in wanted if part.NAME in ENGINES]
    services = [part for part in wanted if part.NAME not in ENGINES]
    await _start_together(supervisor, place, engines)
    home.write_credentials(place, {CREDENTIALS[engine.NAME]: engine.access(place) for engine in engines})
    if len(engines) == len(ENGINES):
        # Here, not at the top: it imports what the engines need no second of.
        from tooling.stack.provision import provision

        await provision(place)
    await _start_together(supervisor, place, services)
    console.print(f"Ready after {time.monotonic() - began:.1f} s.")


async def _start_together(supervisor: Supervisor, place: Place, wanted: list[Engine]) -> None:
    """Starts all of them, also when some fail; raises EngineError with every failure."""
    outcomes = await asyncio.gather(*(_start(supervisor, place, part) for part in wanted), return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        if not isinstance(failure, EngineError):
            raise failure
    if failures:
        raise EngineError("\n".join(str(failure) for failure in failures))


async def _start(supervisor: Supervisor, place: Place, engine: Engine) -> None:
    began = time.monotonic()
    if not (already := _is_running(supervisor, engine.NAME)):
        await asyncio.to_thread(engine.install)
        await asyncio.to_thread(engine.prepare, place)
        place.folder(engine.NAME)
        supervisor.add(engine.NAME, engine.program(place))
    version = await wait_ready(supervisor, place, engine)
    took = "was running" if already else f"ready in {time.monotonic() - began:.1f} s"
    console.print(f"[green]✓[/] {engine.NAME:<11} {version:<9} 127.0.0.1:{place.ports[engine.NAME]:<6} {took}")


async def wait_ready(supervisor: Supervisor, place: Place, engine: Engine) -> str:
    """Waits until the engine answers and returns its version.

    Raises EngineError, with the end of its log, if it gave up or does not answer in five minutes.
    """
    port = place.ports[engine.NAME]
    began = told_at = time.monotonic()
    restarts_before = supervisor.processes()[engine.NAME].restarts
    while True:
        try:
            # A closed port costs next to nothing; a client of the engine costs what the engine needs to start.
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            async with asyncio.timeout(10):
                return await engine.ready(place)
        except Exception as error:
            restarts = supervisor.processes()[engine.NAME].restarts - restarts_before
            if restarts > 3 or time.monotonic() - began > _READY_SECONDS:
                reason = "ends again and again" if restarts > 3 else f"does not answer ({error!r})"
                tail = last_lines(supervisor.log(engine.NAME), 8)
                raise EngineError(f"{engine.NAME} {reason}. `./claw logs {engine.NAME}` ends with:\n{tail}") from error
        if time.monotonic() - told_at > _STILL_WAITING_SECONDS:
            told_at = time.monotonic()
            console.print(f"still waiting for {engine.NAME}, for {told_at - began:.0f} s now")
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
