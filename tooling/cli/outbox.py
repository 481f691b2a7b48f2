"""``./claw outbox resend``: sends again what a wiped bus has lost."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from infra.errors import NotFound
from tooling.stack import operator

app = typer.Typer(no_args_is_help=True, help="What services have sent, kept until no consumer can need it again.")
out = Console(highlight=False)


@app.callback()
def outbox_() -> None:
    """A group with one command keeps its name in the command line."""


@app.command()
def resend(
    destination: Annotated[str, typer.Argument(help="Topic or exchange, as in `./claw map`.")],
    since: Annotated[datetime | None, typer.Option(help="Only what was sent from then on (local time).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Send again, to a topic or exchange, everything that is kept; consumers drop what they have handled."""
    url = operator.engines_access()["postgres"]["url"]
    counts = operator.run(operator.resend_everywhere(url, destination, since and since.astimezone()))
    if not counts:
        raise NotFound(f"nothing that was sent to {destination!r} is kept. Is the name right? See: ./claw map")
    if as_json:
        print(msgspec.json.encode(counts).decode())  # noqa: T201
        return
    for service, count in counts.items():
        out.print(f"{service}: {count} messages to {destination} are sent again by the service's relay")
