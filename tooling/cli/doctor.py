"""``./claw doctor``: finds the problems of this machine and this stack, and says what to do."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass

import psutil
import typer
from rich.console import Console

from tooling.cli.output import Json
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError, Place
from tooling.stack.home import Home, home_folder
from tooling.stack.isolated import is_isolated
from tooling.stack.machine import LEAST_DISK_MB, LEAST_MEMORY_MB, available_memory_mb, check_access, user_name
from tooling.stack.ports import holder, is_free
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor, orphans

_MARKS = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


@dataclass(frozen=True)
class Finding:
    """The result of one examination."""

    level: str
    """ok, warning (the stack works) or problem (it does not)."""
    what: str
    advice: str = ""
    """The action for the person to take; empty for ok."""


def doctor(as_json: Json = False) -> None:
    """Find problems of this machine and this stack, and say what to do. Exit code 1 if there is a problem."""
    home = Home(home_folder())
    findings = examine(home)
    console = Console(highlight=False)
    if as_json:
        console.print_json(json.dumps([asdict(finding) for finding in findings]))
    for finding in () if as_json else findings:
        console.print(f"{_MARKS[finding.level]} {finding.what}", soft_wrap=True)
        if finding.advice:
            console.print(f"  → {finding.advice}", soft_wrap=True)
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def examine(home: Home) -> list[Finding]:
    """Makes all examinations. A damaged state folder is a finding, not an error."""
    findings = [_memory()]
    try:
        check_access(home.path)
        findings.append(_disk(home))
        place = home.place()
    except EngineError as error:
        return [*findings, Finding("problem", str(error))]
    text = f"access: the user {user_name(os.getuid())} can read the code and write {home.path}"
    findings.append(Finding("ok", text))
    supervisor = Supervisor(home.path)
    processes = supervisor.processes()
    idle = []
    for name, part in parts().items():
        try:
            part.install()
        except EngineError as error:
            findings.append(Finding("problem", f"{name}: {error}"))
        running = name in processes and processes[name].pid
        if not running:
            idle.append(name)
            findings += [
                Finding(
                    "problem",
                    f"{name} needs port {place.ports[port]} ({port}), which {holder(place.ports[port])} holds",
                    "Stop that process, or run this stack on other ports: CLAW_PORT_OFFSET=400 ./claw up",
                )
                for port in part.PORTS
                if not is_free(place.ports[port])
            ]
        elif processes[name].restarts > 3:
            count = processes[name].restarts
            advice = f"Read its log: ./claw logs {name}"
            findings.append(Finding("warning", f"{name} has ended unexpectedly {count} times", advice))
    if not processes and (left := orphans(home.path)):
        names = ", ".join(f"{process.name()} ({process.pid})" for process in left)
        text = f"processes of a killed stack still run: {names}"
        findings.append(Finding("problem", text, "Stop them: ./claw down"))
    elif len(idle) == len(parts()):
        known = (home.path / "credentials.json").exists()
        text = f"the stack in {home.path} is stopped" if known else f"no stack was started in {home.path} yet"
        findings.append(Finding("warning", text, "Start it: ./claw up"))
    elif idle:
        findings.append(Finding("warning", f"these parts do not run: {', '.join(idle)}", "Start them: ./claw up"))
    else:
        findings.append(Finding("ok", "all parts of the stack run; ./claw status shows whether they answer"))
    return [*findings, *_exposed(place, home)]


def _disk(home: Home) -> Finding:
    free = shutil.disk_usage(home.path if home.path.exists() else CHECKOUT).free // 1_000_000
    if free < LEAST_DISK_MB:
        return Finding("problem", f"disk: {free} MB are free", f"Delete something: {LEAST_DISK_MB} MB are needed")
    return Finding("ok", f"disk: {free} MB are free")


def _memory() -> Finding:
    free = available_memory_mb()
    if free < LEAST_MEMORY_MB:
        return Finding("warning", f"memory: {free} MB are free", f"All engines together need {LEAST_MEMORY_MB} MB")
    return Finding("ok", f"memory: {free} MB are free")


def _exposed(place: Place, home: Home) -> list[Finding]:
    """The listeners of this stack that other machines on the network can reach."""
    names = {port: name for name, port in place.ports.items()}
    open_ports = set()
    for process in orphans(home.path):
        if is_isolated(process.pid):
            continue
        try:
            for connection in process.net_connections("tcp"):
                local = connection.status == psutil.CONN_LISTEN and connection.laddr.ip.removeprefix("::ffff:")
                if local and local not in ("127.0.0.1", "::1"):
                    open_ports.add(connection.laddr.port)
        except psutil.Error:
            continue
    if not open_ports:
        return [Finding("ok", "network: all processes listen on loopback only")]
    listed = ", ".join(f"{port} ({names.get(port, 'a port that its engine chose')})" for port in sorted(open_ports))
    advice = (
        "This machine allows no network namespace, so other machines can use these ports without a password. "
        "Block them in the firewall."
    )
    return [Finding("warning", f"reachable from the network: {listed}", advice)]
