"""``./claw down``: stops all, leaves no process."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from tooling.cli.up import alone, console
from tooling.stack.home import SERVICES, home_folder
from tooling.stack.supervisor import Supervisor


def down(wipe: Annotated[bool, typer.Option("--wipe", help="Forget all data and passwords too.")] = False) -> None:
    """Stop the stack; with --wipe, forget everything it stored."""
    home = home_folder()
    if not home.exists():
        console.print(f"Nothing to stop: there is no {home}.")
        return
    with alone(home):
        # The services first, while all that they finish their work with is still there.
        Supervisor(home).shutdown(SERVICES, kill=wipe)
        if wipe:
            for path in home.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    console.print("Stopped, and all data forgotten." if wipe else f"Stopped. The data stays in {home}.")
