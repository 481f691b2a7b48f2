"""``./claw logs``: what the parts of the stack have written."""

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
    name: Annotated[str, typer.Argument(help="An engine or service; without it, all.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
) -> None:
    """Show the last lines that an engine or service wrote."""
    supervisor = Supervisor(home_folder())
    known = [*parts(), "supervisord"]
    if name and name not in known:
        raise EngineError(f"{name!r} is none of {', '.join(known)}")
    files = [supervisor.log(one) for one in ([name] if name else known)]
    present = [str(file) for file in files if file.exists()]
    if not present:
        raise EngineError("nothing was written yet: start the stack with ./claw up")
    # `tail` follows through rotation, several files at once.
    words = ["tail", "-n", "100" if name else "10", *(["-F"] if follow else []), *present]
    sys.stdout.flush()
    os.execvp("tail", words)
