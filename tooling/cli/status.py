"""``./claw status``: asks each engine and service whether it works."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tooling.cli.output import Json
from tooling.stack.engines import ENGINES, certificates, postgres
from tooling.stack.engines.base import ANSWER_SECONDS, Engine, Place
from tooling.stack.home import Home, home_folder
from tooling.stack.services import parts
from tooling.stack.supervisor import Process, Supervisor

# A part that does not answer is starting in the first seconds after its start, and has failed later.
_STARTING_SECONDS = 60
_TICK_SECONDS = 0.25
_COLOURS = {"ready": "green", "starting": "yellow", "failed": "red", "stopped": "dim"}


@dataclass(frozen=True)
class Status:
    """One part of the stack, as `status --json` prints it."""

    name: str
    kind: str
    state: str
    version: str | None
    address: str
    latency_ms: float | None
    rss_mb: int
    uptime_s: int
    restarts: int
    problem: str | None
    """A fault that a person must remove although the part answers."""


def status(as_json: Json = False) -> None:
    """Show the state, version, address and memory of each part. Exit code 1 if one is not ready or has a problem."""
    home = Home(home_folder())
    logging.disable()
    statuses = asyncio.run(collect(home.place(), Supervisor(home.path)))
    console = Console()
    if as_json:
        console.print_json(json.dumps([asdict(status) for status in statuses]))
    else:
        console.print(_table(statuses))
        for status in statuses:
            if status.problem:
                console.print(f"[red]{status.name}:[/] {status.problem}", soft_wrap=True)
        if all(status.state == "stopped" for status in statuses):
            console.print("The stack does not run. Start it with ./claw up")
    if any(status.state != "ready" or status.problem for status in statuses):
        raise typer.Exit(1)


async def collect(place: Place, supervisor: Supervisor) -> list[Status]:
    """The state of each part of the stack."""
    processes = {
        name: process
        for name, process in supervisor.processes().items()
        if process.state not in ("STOPPED", "STOPPING")
    }
    running = [part for name, part in parts().items() if name in processes]
    # All at once, for a first answer. Then one after the other: this measures the time of an answer, and it is a second
    # attempt for a part that did not answer while this process imported all clients on a busy machine.
    versions = dict(
        zip((part.NAME for part in running), await asyncio.gather(*(ask(part, place) for part in running)), strict=True)
    )
    latencies = {}
    for part in running:
        began = time.perf_counter()
        if version := await ask(part, place):
            versions[part.NAME] = version
            latencies[part.NAME] = round((time.perf_counter() - began) * 1000, 1)
    problems = {name: certificates.problem(place, name) for name in processes}
    if versions.get(postgres.NAME) and (problem := await postgres.problem(place)):
        problems[postgres.NAME] = problem
    return [
        _status(
            part,
            place,
            processes.get(name),
            versions.get(name),
            latencies.get(name),
            problems.get(name),
        )
        for name, part in parts().items()
    ]


async def ask(part: Engine, place: Place) -> str | None:
    """The version of the part if it answers a client; None if it does not.

    The part may be silent for ANSWER_SECONDS. Only the time in which this process listens counts: while it imports
    clients, or while the machine does not run it, an answer may have arrived that it has not read yet.
    """
    question = asyncio.ensure_future(part.ready(place))
    for _ in range(round(ANSWER_SECONDS / _TICK_SECONDS)):
        await asyncio.wait({question}, timeout=_TICK_SECONDS)
        if question.done():
            break
    question.cancel()
    [answer] = await asyncio.gather(question, return_exceptions=True)
    # Any exception of a client means that the part does not work.
    return None if isinstance(answer, BaseException) else answer


def _status(
    part: Engine,
    place: Place,
    process: Process | None,
    version: str | None,
    latency_ms: float | None,
    problem: str | None,
) -> Status:
    if process is None:
        state = "stopped"
    elif version:
        state = "ready"
    else:
        state = "starting" if process.uptime_s < _STARTING_SECONDS and process.state != "FATAL" else "failed"
    return Status(
        part.NAME,
        "engine" if part.NAME in ENGINES else "service",
        state,
        version,
        f"127.0.0.1:{place.ports[part.NAME]}",
        latency_ms,
        _memory_mb(process.pid) if process else 0,
        process.uptime_s if process else 0,
        process.restarts if process else 0,
        problem,
    )


def _memory_mb(pid: int) -> int:
    """The memory of the process and all below it. Memory that they share, as those of PostgreSQL do, counts once."""
    try:
        process = psutil.Process(pid)
        tree = [one.memory_info() for one in [process, *process.children(recursive=True)]] if pid else []
    except psutil.Error:
        return 0
    shared = [getattr(info, "shared", 0) for info in tree]
    return int(sum(info.rss for info in tree) - sum(shared) + max(shared, default=0)) // 1_000_000


def _table(statuses: list[Status]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("name", "state", "version", "address"):
        table.add_column(column)
    for column in ("ms", "MB", "up", "restarts"):
        table.add_column(column, justify="right")
    for status in statuses:
        colour = _COLOURS[status.state]
        up = f"{status.uptime_s // 3600}:{status.uptime_s % 3600 // 60:02}:{status.uptime_s % 60:02}"
        latency = "" if status.latency_ms is None else f"{status.latency_ms:.0f}"
        figures = (latency, str(status.rss_mb), up, str(status.restarts))
        table.add_row(status.name, f"[{colour}]{status.state}[/]", status.version, status.address, *figures)
    return table
