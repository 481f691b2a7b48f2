"""``./claw up``: starts the engines and services that do not run, and waits until each of them works."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from infra.errors import describe
from tooling.cli import locks
from tooling.cli.output import Json, print_json
from tooling.stack.engines import CREDENTIALS, ENGINES, certificates
from tooling.stack.engines.base import Engine, EngineError, Place, write_atomically
from tooling.stack.engines.postgres import ARCHIVE
from tooling.stack.home import UNFINISHED, Home, home_folder
from tooling.stack.isolated import is_possible
from tooling.stack.machine import check_access, check_machine
from tooling.stack.ports import check_ports
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor

# A busy machine may take minutes to load nine services at once. A part that ends repeatedly fails earlier.
_READY_SECONDS = 300
_MOST_RESTARTS = 3
_STILL_WAITING_SECONDS = 30
console = Console(stderr=True, highlight=False)


def up(
    only: Annotated[str, typer.Option(help="The parts to start, separated by commas. Default: all.")] = "",
    tls: Annotated[bool, typer.Option("--tls", help="Use mutual TLS from now on, until the stack is wiped.")] = False,
    archive: Annotated[
        str, typer.Option(help="Archive the database's WAL from now on: a folder, or s3://bucket/prefix.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Start all engines and services that do not run. Return when all of them are ready."""
    known = parts()
    names = only.split(",") if only else list(known)
    for name in names:
        if name not in known:
            raise EngineError(f"--only: {name!r} must be one of {', '.join(known)}")
    home = Home(home_folder())
    check_access(home.path)
    if not only and (home.path / UNFINISHED).exists():
        raise EngineError(
            f"{home.path}: a restore was interrupted. Start it again (./claw restore FILE), or delete the stack: "
            "./claw down --wipe"
        )
    place = home.place()
    with one_command_at_a_time(home.path):
        if tls and not certificates.in_use(place) and Supervisor(home.path).running():
            raise EngineError("--tls: this stack runs without TLS: stop it first: ./claw down")
        if tls or certificates.in_use(place):
            certificates.issue(place, _owners(known), renew=not Supervisor(home.path).running())
        if archive:
            _archive(home, place, archive)
        # The clients would log every refused connection, which is normal while an engine starts.
        logging.disable()
        started = asyncio.run(_start_all(home, place, [known[name] for name in names]))
    if as_json:
        print_json({"home": str(home.path), "started": started})


def _archive(home: Home, place: Place, to: str) -> None:
    """Stores the place of the archive. PostgreSQL reads it at its start."""
    # Imported here: the client of object stores takes time, and most starts need none.
    import msgspec

    from tooling.stack.backup.targets import store_access
    from tooling.stack.backup.wal import Archive

    if not to.startswith("s3://") and Path(to).absolute().is_relative_to(home.path):
        raise EngineError(f"--archive: must be outside of {home.path}, which a restore makes empty")
    store = store_access(ENGINES["s3"].access(place)) if to.startswith("s3://") else {}
    wanted = Archive(to if store else str(Path(to).absolute()), place.secret("wal"), store)
    file, text = home.path / ARCHIVE, msgspec.json.encode(wanted).decode()
    if file.exists() and file.read_text() == text:
        return
    if Supervisor(home.path).running():
        raise EngineError("--archive: this stack runs with another setting: stop it first: ./claw down")
    write_atomically(file, text)


def _owners(known: Iterable[str]) -> list[str]:
    """Who gets a certificate. OpenSearch and Milvus know no TLS: it is served before them if a namespace hides them."""
    hidden = {"opensearch", "milvus"}
    if not is_possible():
        console.print("This machine allows no network namespaces: opensearch and milvus stay without TLS.")
        return [*(name for name in known if name not in hidden), certificates.ADMIN]
    return [*known, certificates.ADMIN]


async def _start_all(home: Home, place: Place, wanted: list[Engine]) -> list[str]:
    """Returns the names of the parts that did not run before."""
    began = time.monotonic()
    check_machine(home.path)
    supervisor = Supervisor(home.path)
    supervisor.start()
    running = [name for name, process in supervisor.processes().items() if process.pid]
    check_ports(place, [part for part in wanted if part.NAME not in running])
    engines = [part for part in wanted if part.NAME in ENGINES]
    services = [part for part in wanted if part.NAME not in ENGINES]
    old = [part for part in wanted if part.NAME in running]
    new = [part for part in wanted if part not in old]
    if old:
        console.print(f"{_count(old)} already running.", soft_wrap=True)
    if new:
        console.print(f"Starting {_count(new)}. State: {home.path}", soft_wrap=True)
    await _start_together(supervisor, place, engines)
    home.write_credentials(place, {CREDENTIALS[engine.NAME]: engine.access(place) for engine in engines})
    if len(engines) == len(ENGINES):
        # Imported here: the imports take time, which the start of engines need not wait for.
        from tooling.stack.provision import provision

        await provision(place)
    await _start_together(supervisor, place, services)
    console.print(f"Ready after {time.monotonic() - began:.1f} s.")
    return [part.NAME for part in new]


def _count(some: list[Engine]) -> str:
    engines = sum(part.NAME in ENGINES for part in some)
    counts = ((engines, "engine"), (len(some) - engines, "service"))
    return " and ".join(f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts if count)


async def _start_together(supervisor: Supervisor, place: Place, wanted: list[Engine]) -> None:
    """Starts all of them at the same time. Raises EngineError with every failure, after all have started or failed."""
    tasks = {asyncio.create_task(_start(supervisor, place, part), name=part.NAME) for part in wanted}
    waiting, began = tasks, time.monotonic()
    while waiting:
        _, waiting = await asyncio.wait(waiting, timeout=_STILL_WAITING_SECONDS)
        names = ", ".join(sorted(task.get_name() for task in waiting))
        if names and time.monotonic() - began >= _STILL_WAITING_SECONDS:
            console.print(f"  after {time.monotonic() - began:.0f} s still waiting for {names}", soft_wrap=True)
    failures = [error for task in tasks if (error := task.exception())]
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
    version = await wait_ready(supervisor, engine.NAME, place.ports[engine.NAME], partial(engine.ready, place))
    if not already:
        took = f"ready after {time.monotonic() - began:.1f} s"
        console.print(f"[green]✓[/] {engine.NAME:<14} {version:<8} 127.0.0.1:{place.ports[engine.NAME]:<5}  {took}")


async def wait_ready(supervisor: Supervisor, name: str, port: int, ready: Callable[[], Awaitable[str]]) -> str:
    """Waits until the program listens on its port and `ready` does not raise. Returns the version from `ready`.

    Raises EngineError with the end of its log if the program ends repeatedly or does not answer within five minutes.
    """
    began = time.monotonic()
    restarts_before = supervisor.processes()[name].restarts
    while True:
        try:
            # A connection to a closed port costs almost nothing. A client would take CPU time from the starting engine.
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            async with asyncio.timeout(10):
                return await ready()
        except Exception as error:
            restarts = supervisor.processes()[name].restarts - restarts_before
            if restarts > _MOST_RESTARTS or time.monotonic() - began > _READY_SECONDS:
                reason = (
                    f"ended {restarts} times after its start"
                    if restarts > _MOST_RESTARTS
                    else f"did not answer within {_READY_SECONDS} s ({describe(error)})"
                )
                tail = last_lines(supervisor.log(name), 8)
                raise EngineError(f"{name} {reason}. Its log (./claw logs) ends with:\n{tail}") from error
        await asyncio.sleep(0.2)


def last_lines(path: Path, count: int) -> str:
    """The last lines of a text file; empty if the file does not exist."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-count:])


def _is_running(supervisor: Supervisor, name: str) -> bool:
    process = supervisor.processes().get(name)
    return process is not None and process.state in ("RUNNING", "STARTING", "BACKOFF")


@contextmanager
def one_command_at_a_time(home: Path) -> Iterator[None]:
    """A lock, so that only one command at a time starts or stops this stack. The lock ends with its process."""
    with (home / "lock").open("w") as file:
        locks.take(file.fileno(), "`./claw up` or `./claw down`", console)
        yield
