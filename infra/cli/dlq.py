"""``./claw dlq``: the dead letters of every service in one place."""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import UUID

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from infra.bus import deadletter, redrive
from infra.bus.deadletter import DeadLetterView
from infra.cli import operator
from infra.errors import Conflict, NotFound

app = typer.Typer(no_args_is_help=True, help="List, read, redrive and discard what could not be processed.")
out = Console(highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[UUID, typer.Argument(help="The dead letter's id, from `claw dlq list`.")]


@app.command("list")
def list_(service: str = "", limit: int = 100, json: Json = False) -> None:
    """Show what is open, oldest first."""
    letters = asyncio.run(find_all(operator.engines_access()["postgres"]["url"], service, limit))
    if json:
        print(msgspec.json.encode(letters).decode())  # noqa: T201
        return
    if not letters:
        out.print("No dead letters.")
        return
    table = Table("id", "consumer", "source", "key", "state", "tries", "error", box=None, pad_edge=False)
    for letter in letters:
        first_line = letter.error.partition("\n")[0]
        row = (letter.consumer, letter.source, letter.key or "", letter.state, str(letter.attempts), first_line)
        table.add_row(str(letter.id), *row)
    out.print(table)


@app.command()
def show(id: Id, json: Json = False) -> None:
    """Show one dead letter with its headers and payload."""
    letter = asyncio.run(find(operator.engines_access()["postgres"]["url"], id))
    if json:
        print(msgspec.json.encode(letter).decode())  # noqa: T201
        return
    for name in DeadLetterView.__struct_fields__:
        value = getattr(letter, name)
        out.print(f"[bold]{name}[/]: ", end="")
        out.print(value if not isinstance(value, dict) else msgspec.json.encode(value).decode(), markup=False)


@app.command("redrive")
def redrive_(
    ids: Annotated[list[UUID] | None, typer.Argument(help="Which; with --all not needed.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every failed one of the service.")] = False,
    service: Annotated[str, typer.Option(help="With --all: the service.")] = "",
    force: Annotated[bool, typer.Option(help="Also what is older than repeats are remembered.")] = False,
) -> None:
    """Have the service handle dead letters again; what waits behind them follows in order."""
    url = operator.engines_access()["postgres"]["url"]
    count = asyncio.run(redrive_many(url, ids or [], service if all_ else None, force=force))
    out.print(f"{count} to be redriven; the service does so within seconds. See how: claw dlq list")


@app.command()
def discard(id: Id) -> None:
    """Give a dead letter up for good; what waits behind it follows."""
    asyncio.run(discard_one(operator.engines_access()["postgres"]["url"], id))
    out.print(f"{id} is discarded. It is kept for the record; its message will not be handled again.")


async def find_all(url: str, service: str, limit: int) -> list[DeadLetterView]:
    """What is open in all services, or in one. Raises NotFound for a service that is not there."""
    names = await operator.services(url)
    if service and service not in names:
        raise NotFound(f"service {service}: not in this stack ({', '.join(names)})")
    found: list[DeadLetterView] = []
    for name in [service] if service else names:
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            found += await deadletter.list_dead_letters(connection, name, limit=limit)
    return sorted(found, key=lambda letter: letter.first_failed_at)[:limit]


async def find(url: str, id_: UUID) -> DeadLetterView:
    """Raises NotFound."""
    for name in await operator.services(url):
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            letter = await deadletter.get_dead_letter(connection, name, id_)
        if letter:
            return letter
    raise NotFound(f"dead letter {id_}: there is none")


async def redrive_many(url: str, ids: list[UUID], all_of: str | None, *, force: bool = False) -> int:
    """Requests the redrive of `ids`, or of every failed one of the service `all_of`. Returns how many."""
    if all_of is not None:
        if not all_of:
            raise Conflict("--all: name the service with --service")
        ids = [letter.id for letter in await find_all(url, all_of, 10_000) if letter.state == "failed"]
    services = {id_: (await find(url, id_)).service for id_ in ids}
    for name in sorted(set(services.values())):
        async with operator.database(url, name) as database, database.begin() as tx:
            mine = [id_ for id_ in ids if services[id_] == name]
            await redrive.request_redrive(tx, mine, actor=operator.actor(), force=force)
    return len(ids)


async def discard_one(url: str, id_: UUID) -> None:
    """Raises NotFound, and Conflict where it is not open."""
    letter = await find(url, id_)
    async with operator.database(url, letter.service) as database, database.begin() as tx:
        await redrive.discard(tx, id_, actor=operator.actor())
