"""``./claw dlq``: the dead letters of every service in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated
from uuid import UUID

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from infra.errors import Conflict, NotFound
from infra.postgres import dead_letters
from infra.postgres.dead_letters import DeadLetterView
from infra.service import redrive
from tooling.stack import operator
from tooling.stack.operator import printable

app = typer.Typer(no_args_is_help=True, help="List, read, redrive and discard what could not be processed.")
out = Console(highlight=False)
# No service has more open at once that an operator would want in one answer.
ALL = 10_000

Json = Annotated[bool, typer.Option("--json", help="For programs.")]
Id = Annotated[UUID, typer.Argument(help="The dead letter's id, from `./claw dlq list`.")]


@app.command("list")
def list_(
    service: Annotated[str, typer.Option(help="Only those of this service.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 100,
    as_json: Json = False,
) -> None:
    """Show what is open, oldest first."""
    letters = operator.run(find_all(_database(), service, limit))
    if as_json:
        print(msgspec.json.encode(letters).decode())  # noqa: T201
        return
    if not letters:
        out.print("No dead letters.")
        return
    for letter in letters:
        when = f"{letter.first_failed_at:%Y-%m-%d %H:%M} UTC"
        _line(f"{letter.id}  {letter.state:<9}  {letter.attempts} tries  {when}", "bold")
        _line(f"  {letter.consumer} could not handle {letter.source}" + (f", key {letter.key}" if letter.key else ""))
        _line(f"  {letter.error}")
    states = Counter(letter.state for letter in letters)
    out.print(", ".join(f"{count} {state}" for state, count in states.items()), style="bold")
    if len(letters) == limit:
        out.print(f"There may be more than these {limit}: ./claw dlq list --limit {limit * 10}")
    out.print("Read one: ./claw dlq show ID. Handle it again: redrive ID. Give it up: discard ID.")


@app.command()
def show(id: Id, as_json: Json = False) -> None:
    """Show one dead letter with its headers and payload."""
    letter = operator.run(find(_database(), id))
    if as_json:
        print(msgspec.json.encode(letter).decode())  # noqa: T201
        return
    shown = msgspec.to_builtins(letter)
    width = max(map(len, shown)) + 1
    for name, value in shown.items():
        lines = [f"{key}: {text}" for key, text in value.items()] if isinstance(value, dict) else str(value).split("\n")
        for nth, line in enumerate(lines):
            label = Text("" if nth else name, "bold")
            label.pad_right(width - len(label))
            # Not broken at 80 columns: what is read here is also copied from here.
            out.print(label.append(printable(line), "not bold"), soft_wrap=True)


@app.command("redrive")
def redrive_(
    ids: Annotated[list[UUID] | None, typer.Argument(help="Which, from `./claw dlq list`.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every failed one of --service.")] = False,
    service: Annotated[str, typer.Option(help="With --all: the service.")] = "",
    force: Annotated[bool, typer.Option(help="Also what is older than repeats are remembered.")] = False,
    as_json: Json = False,
) -> None:
    """Have the service handle dead letters again; what waits behind them follows in order."""
    if all_ == bool(ids) or all_ != bool(service):
        raise Conflict("name dead letters by their ids, or all of one service: --all --service NAME")
    count = operator.run(redrive_many(_database(), ids or [], service, force=force))
    if as_json:
        print(msgspec.json.encode({"redriving": count}).decode())  # noqa: T201
    else:
        out.print(f"{count} to be redriven; the service does so while it runs. See how: ./claw dlq list")


@app.command()
def discard(id: Id, as_json: Json = False) -> None:
    """Give a dead letter up for good; what waits behind it follows."""
    operator.run(discard_one(_database(), id))
    if as_json:
        print(msgspec.json.encode({"discarded": id}).decode())  # noqa: T201
    else:
        out.print(f"{id} is discarded: kept for the record, never handled again.")


async def find_all(url: str, service: str, limit: int) -> list[DeadLetterView]:
    """What is open in all services, or in one. Raises NotFound for a service that is not there."""
    names = await operator.services(url)
    if service and service not in names:
        raise NotFound(f"service {service}: not in this stack ({', '.join(names) or 'which has none yet'})")
    found: list[DeadLetterView] = []
    for name in [service] if service else names:
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            found += await dead_letters.list_dead_letters(connection, name, limit=limit)
    return sorted(found, key=lambda letter: letter.first_failed_at)[:limit]


async def find(url: str, id_: UUID) -> DeadLetterView:
    """Raises NotFound."""
    for name in await operator.services(url):
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            letter = await dead_letters.get_dead_letter(connection, name, id_)
        if letter:
            return letter
    raise NotFound(f"dead letter {id_}: does not exist; see: ./claw dlq list")


async def redrive_many(url: str, ids: Iterable[UUID], service: str = "", *, force: bool = False) -> int:
    """Requests the redrive of `ids`, or without any of every failed one of `service`. Returns how many.

    Of one service all or none. Raises NotFound, and Conflict for one that cannot be redriven.
    """
    letters = [await find(url, id_) for id_ in dict.fromkeys(ids)]
    if not letters:
        letters = [letter for letter in await find_all(url, service, ALL) if letter.state == "failed"]
    for name in sorted({letter.service for letter in letters}):
        async with operator.database(url, name) as database, database.begin() as tx:
            mine = [letter.id for letter in letters if letter.service == name]
            await redrive.request_redrive(tx, mine, actor=operator.actor(), force=force)
    return len(letters)


async def discard_one(url: str, id_: UUID) -> None:
    """Raises NotFound, and Conflict where it is not open."""
    letter = await find(url, id_)
    async with operator.database(url, letter.service) as database, database.begin() as tx:
        await redrive.discard(tx, id_, actor=operator.actor())


def _database() -> str:
    return operator.engines_access()["postgres"]["url"]


def _line(text: str, style: str = "") -> None:
    """One line, cut at the terminal's width."""
    out.print(Text(printable(text), style), no_wrap=True, overflow="ellipsis")
