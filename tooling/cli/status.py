"""``./claw status``: what runs, and whether it works."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import ANSWER_SECONDS, Engine, Place
from tooling.stack.home import Home, home_folder
from tooling.stack.services import parts
from tooling.stack.supervisor import Process, Supervisor

# A part that does not answer this long after its start has failed.
_STARTING_SECONDS = 60
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


def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Show every engine and service: state, version, address, memory, restarts. Exit code 1 if not all are ready."""
    home = Home(home_folder())
    logging.disable()
    statuses = asyncio.run(collect(home.place(), Supervisor(home.path)))
    console = Console()
    if as_json:
        console.print_json(json.dumps([asdict(status) for status in statuses]))
    else:
        console.print(_table(statuses))
    if any(status.state != "ready" for status in statuses):
        raise typer.Exit(1)


async def collect(place: Place, supervisor: Supervisor) -> list[Status]:
    """Asks every part, all at once; then those that answered once more, alone, for the time that it takes."""
    processes = supervisor.processes()
    asked = await asyncio.gather(*(_ask(part, place, processes.get(name)) for name, part in parts().items()))
    return [replace(one, latency_ms=await _latency(one.name, place)) if one.state == "ready" else one for one in asked]


async def _latency(name: str, place: Place) -> float | None:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await parts()[name].ready(place)
    except Exception:
        return None
    return round((time.perf_counter() - began) * 1000, 1)


async def _ask(part: Engine, place: Place, process: Process | None) -> Status:
    version = None
    if process is None or process.state in ("STOPPED", "STOPPING"):
        state = "stopped"
    else:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                version = await part.ready(place)
            state = "ready"
        except Exception:
            # Whatever its client raises, the part does not work.
            young = process.uptime_s < _STARTING_SECONDS and process.state != "FATAL"
            state = "starting" if young else "failed"
    return Status(
        part.NAME,
        "engine" if part.NAME in ENGINES else "service",
        state,
        version,
        f"127.0.0.1:{place.ports[part.NAME]}",
        None,
        _memory_mb(process.pid) if process else 0,
        process.uptime_s if process else 0,
        process.restarts if process else 0,
    )


def _memory_mb(pid: int) -> int:
    """Resident memory of the process and all below it."""
    try:
        process = psutil.Process(pid)
        tree = [process, *process.children(recursive=True)] if pid else []
        return int(sum(one.memory_info().rss for one in tree)) // 1_000_000
    except psutil.Error:
        return 0


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
