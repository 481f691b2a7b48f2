"""All commands of ``./claw``, in the order in which the help shows them."""

from __future__ import annotations

import sys

import typer

from infra.cli import down, up
from infra.engines.base import EngineError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(up.up)
app.command()(down.down)


def main() -> None:
    """Runs the command; what a person can mend is said in plain words, with exit code 1."""
    try:
        app()
    except EngineError as error:
        print(f"claw: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
