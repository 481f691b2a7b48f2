"""``./claw logs``: the log files of the engines and services."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tooling.stack.engines.base import EngineError
from tooling.stack.home import home_folder
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor


def logs(
    name: Annotated[str, typer.Argument(help="An engine or service. Default: all.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines.")] = False,
) -> None:
    """Show the last lines of an engine's or a service's log."""
    supervisor = Supervisor(home_folder())
    known = [*parts(), "supervisord"]
    if name and name not in known:
        raise EngineError(f"{name!r}: must be one of {', '.join(known)}")
    files = [supervisor.log(one) for one in ([name] if name else known)]
    present = [str(file) for file in files if file.exists()]
    if not present:
        raise EngineError("there are no logs yet: start the stack with ./claw up")
    # `tail -F` follows several files at once, also when they are rotated.
    words = ["tail", "-n", "100" if name else "10", *(["-F"] if follow else []), *present]
    sys.stdout.flush()
    os.execvp("tail", words)
