"""All commands of ``./claw``, in the order in which the help shows them."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from infra.errors import Conflict, InvalidMessage, NotFound
from tooling.stack.engines.base import EngineError
from tooling.stack.privileges import leave_root

# Each is the function of that name in the module of that name, or the module's `app`, a group of commands.
COMMANDS = (
    "up",
    "down",
    "status",
    "doctor",
    "logs",
    "map",
    "test",
    "check",
    "contracts",
    "compose",
    "dlq",
    "outbox",
    "replay",
    "demo",
    "chat",
    "run",
    "bench",
)
# These act on processes and files of the stack, which are not root's.
_OF_THE_STACK = ("up", "down", "status", "doctor", "logs", "demo")


def build(names: tuple[str, ...]) -> typer.Typer:
    """The command line with these commands."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    # Makes a group even of one command.
    app.callback()(lambda: None)
    for name in names:
        module = import_module(f"tooling.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            settings = getattr(module, "CONTEXT", None)
            app.command(name, context_settings=settings)(getattr(module, name))
    return app


def main() -> None:
    """Runs the command; what a person can mend is said in plain words, with exit code 1."""
    wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        if wanted in _OF_THE_STACK and "--help" not in sys.argv:
            leave_root()
        # Only the wanted one: what the others import takes seconds.
        build((wanted,) if wanted in COMMANDS else COMMANDS)(prog_name="./claw")
    except (EngineError, NotFound, Conflict, InvalidMessage) as error:
        print(f"claw: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
