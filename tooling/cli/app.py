"""All commands of ``./claw``, in the order in which the help shows them."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from infra.errors import Conflict, InvalidMessage, NotFound
from tooling.cli.output import printable
from tooling.stack.engines.base import EngineError
from tooling.stack.privileges import leave_root

# Each command is the function of its name in the module of its name. A group of commands is the module's `app`.
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
    "rotate",
    "dlq",
    "outbox",
    "replay",
    "memory",
    "demo",
    "rerate",
    "chat",
    "run",
    "bench",
    "prove",
    "backup",
    "restore",
    "rolling-restart",
)
# Names of other deployments' scripts. The help of ./claw does not list them.
ALIASES = {
    "install": "up",
    "start": "up",
    "stop": "down",
    "health": "status",
    "restart": "rolling-restart",
    "update": "rolling-restart",
    "help": "--help",
}
# These commands act on processes and files of the stack, which belong to the user `clawbus` if root starts it.
_OF_THE_STACK = ("up", "down", "status", "doctor", "logs", "demo", "rotate", "rolling-restart")


def build(names: tuple[str, ...]) -> typer.Typer:
    """The command line that has these commands."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    # With a callback the command line expects a command's name, also if it has one command only.
    app.callback()(lambda: None)
    for name in names:
        module = import_module(f"tooling.cli.{name.replace('-', '_')}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name)
        else:
            settings = getattr(module, "CONTEXT", None)
            app.command(name, context_settings=settings)(getattr(module, name.replace("-", "_")))
    return app


def main() -> None:
    """Runs the command. An error that a person can correct is printed in one sentence, and the exit code is 1."""
    sys.argv[1:2] = [ALIASES.get(word, word) for word in sys.argv[1:2]]
    wanted = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        if wanted in _OF_THE_STACK and "--help" not in sys.argv:
            leave_root()
        # Only the command that is called: the imports of all commands take seconds.
        build((wanted,) if wanted in COMMANDS else COMMANDS)(prog_name="./claw")
    except (EngineError, NotFound, Conflict, InvalidMessage) as error:
        # An error may quote text from outside.
        text = "\n".join(map(printable, str(error).split("\n")))
        print(f"claw: {text}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    except PermissionError as error:
        reason = f"this user may not use {error.filename}. Run ./claw as the user who started the stack, or as root"
        print(f"claw: {reason}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
