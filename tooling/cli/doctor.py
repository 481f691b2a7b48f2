"""``./claw doctor``: what is wrong with this machine or this stack, and what to do."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import Annotated

import psutil
import typer
from rich.console import Console

from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError, Place
from tooling.stack.home import Home, home_folder
from tooling.stack.machine import LEAST_DISK_MB, LEAST_MEMORY_MB, available_memory_mb, check_access
from tooling.stack.ports import holder, is_free
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor, orphans

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `level`: ok, warning (works, but) or problem (does not)."""

    level: str
    what: str
    advice: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """Look for what keeps the stack from working, and say what to do. Exit code 1 if there is a problem."""
    home = Home(home_folder())
    findings = examine(home)
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps([asdict(finding) for finding in findings]))
    for finding in () if as_json else findings:
        console.print(f"{_MARKS[finding.level]} {finding.what}")
        if finding.advice:
            console.print(f"    {finding.advice}", style="dim")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def examine(home: Home) -> list[Finding]:
    """Looks at everything; a damaged state folder is a finding too."""
    findings = [_disk(home), _memory()]
    try:
        check_access(home.path)
        place = home.place()
    except EngineError as error:
        return [*findings, Finding("problem", str(error))]
    findings.append(Finding("ok", "the engines' user can read the code and write the state"))
    supervisor = Supervisor(home.path)
    processes = supervisor.processes()
    for name, part in parts().items():
        try:
            part.install()
        except EngineError as error:
            findings.append(Finding("problem", f"{name}: {error}"))
        running = name in processes and processes[name].pid
        if not running:
            findings += [
                Finding(
                    "problem",
                    f"port {place.ports[port]} ({port}) is taken by {holder(place.ports[port])}",
                    "Stop it, or run this stack elsewhere: CLAW_PORT_OFFSET=400 ./claw up",
                )
                for port in part.PORTS
                if not is_free(place.ports[port])
            ]
        elif processes[name].restarts > 3:
            count = processes[name].restarts
            findings.append(Finding("warning", f"{name} was restarted {count} times", f"See ./claw logs {name}"))
    if not processes and (left := orphans(home.path)):
        names = ", ".join(f"{process.name()} ({process.pid})" for process in left)
        findings.append(Finding("problem", f"left behind by a stack that was killed: {names}", "Run ./claw down"))
    return [*findings, *_exposed(place, home)]


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.path if home.path.exists() else CHECKOUT).free // 1_000_000
    if free < LEAST_DISK_MB:
        return Finding("problem", f"{free} MB of disk are free", f"Make room: {LEAST_DISK_MB} MB are needed")
    return Finding("ok", f"{free} MB of disk are free")


def _memory() -> Finding:
    free = available_memory_mb()
    if free < LEAST_MEMORY_MB:
        return Finding("warning", f"{free} MB of memory are free", f"All engines together take {LEAST_MEMORY_MB} MB")
    return Finding("ok", f"{free} MB of memory are free")


def _exposed(place: Place, home: Home) -> list[Finding]:
    """Listeners of this stack that others on the network can reach."""
    names = {port: name for name, port in place.ports.items()}
    open_ports = set()
    for process in orphans(home.path):
        try:
            for connection in process.net_connections("tcp"):
                local = connection.status == psutil.CONN_LISTEN and connection.laddr.ip.removeprefix("::ffff:")
                if local and local not in ("127.0.0.1", "::1"):
                    open_ports.add(connection.laddr.port)
        except psutil.Error:
            continue
    if not open_ports:
        return [Finding("ok", "everything listens on loopback only")]
    listed = ", ".join(f"{port} ({names.get(port, 'not ours to choose')})" for port in sorted(open_ports))
    advice = "Close these ports in the firewall if the network is not yours: the engine cannot be told to."
    return [Finding("warning", f"reachable from the network: {listed}", advice)]
