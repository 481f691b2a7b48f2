"""``./claw outbox resend``: sends the messages again that a wiped broker has lost."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console

from infra.errors import NotFound
from tooling.cli.output import Json, print_json
from tooling.stack import operator

app = typer.Typer(no_args_is_help=True, help="The sent messages, which each service keeps for a while.")
out = Console(highlight=False)


@app.callback()
def outbox_() -> None:
    """Without this function, a group with one command would lose the command's name."""


@app.command()
def resend(
    destination: Annotated[str, typer.Argument(help="The topic or exchange, see `./claw map`.")],
    since: Annotated[datetime | None, typer.Option(help="Only messages sent since then (local time).")] = None,
    as_json: Json = False,
) -> None:
    """Send all kept messages of a topic or exchange again. Consumers ignore those that they have handled."""
    url = operator.engines_access()["postgres"]["url"]
    counts = operator.run(operator.resend_everywhere(url, destination, since and operator.local_time("--since", since)))
    if not counts:
        raise NotFound(f"no kept messages to {destination!r}. ./claw map shows the names of topics and queues")
    if as_json:
        print_json(counts)
        return
    for service, count in counts.items():
        out.print(f"{service}: its relay will send {count} messages to {destination} again")
