"""``./claw down``: stops the stack and leaves no process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from tooling.cli.output import Json, print_json
from tooling.cli.up import console, one_command_at_a_time
from tooling.stack.home import SERVICES, home_folder
from tooling.stack.supervisor import Supervisor


def down(
    wipe: Annotated[bool, typer.Option("--wipe", help="Delete all data and passwords too.")] = False,
    as_json: Json = False,
) -> None:
    """Stop the stack. With --wipe, also delete everything it has stored."""
    home = home_folder()
    if not home.exists():
        console.print(f"Nothing to stop: {home} does not exist.", soft_wrap=True)
    else:
        _stop(home, wipe=wipe)
        if not as_json:
            done = f"All data in {home} is deleted." if wipe else f"The data stays in {home}."
            console.print(f"Stopped. {done}", soft_wrap=True)
    if as_json:
        print_json({"home": str(home), "data": home.exists() and not wipe})


def _stop(home: Path, *, wipe: bool) -> None:
    with one_command_at_a_time(home):
        # The services first: they need the engines to finish their work.
        Supervisor(home).shutdown(SERVICES, kill=wipe)
        if wipe:
            for path in home.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
