"""``./claw outbox resend``: sends again what a wiped bus has lost."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console

from infra.bus import outbox
from infra.cli import operator

app = typer.Typer(no_args_is_help=True, help="What services have sent, kept until no consumer can need it again.")
out = Console(highlight=False)


@app.callback()
def outbox_() -> None:
    """A group with one command keeps its name in the command line."""


@app.command()
def resend(
    destination: Annotated[str, typer.Argument(help="Topic or exchange.")],
    since: Annotated[datetime | None, typer.Option(help="Only what was sent from then on.")] = None,
) -> None:
    """Send again, to a topic or exchange, everything that is kept; consumers drop what they have handled."""
    counts = asyncio.run(resend_everywhere(operator.engines_access()["postgres"]["url"], destination, since))
    for service, count in counts.items():
        out.print(f"{service}: {count} messages to {destination} are sent again")
    if not any(counts.values()):
        out.print(f"Nothing that was sent to {destination} is kept. Is the name right? See: claw map")


async def resend_everywhere(url: str, destination: str, since: datetime | None = None) -> dict[str, int]:
    """Service → how many messages are sent again."""
    counts = {}
    for name in await operator.services(url):
        async with operator.database(url, name) as database, database.begin() as tx:
            counts[name] = await outbox.resend(await tx.connection(), destination, since=since)
    return {name: count for name, count in counts.items() if count}
