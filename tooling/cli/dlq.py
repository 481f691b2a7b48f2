"""``./claw dlq``: the dead letters of all services."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Annotated
from uuid import UUID

import msgspec
import typer
from msgspec.structs import replace
from rich.console import Console
from rich.text import Text

from infra.errors import Conflict, NotFound
from infra.postgres import dead_letters
from infra.postgres.dead_letters import DeadLetterView, Sealing
from infra.security.audit import audit
from infra.security.crypto import Cipher
from infra.security.sealed_letters import SealedLetters
from infra.service import redrive
from tooling.stack import operator
from tooling.stack.home import Home, home_folder
from tooling.stack.keys import master_file
from tooling.stack.operator import printable
from tooling.stack.services import keys_folder

app = typer.Typer(no_args_is_help=True, help="List, show, redrive and discard messages that could not be processed.")
out = Console(highlight=False)
# The most dead letters of one service that `redrive --all` handles in one call.
ALL = 10_000

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Id = Annotated[UUID, typer.Argument(help="The dead letter's id, from `./claw dlq list`.")]


@app.command("list")
def list_(
    service: Annotated[str, typer.Option(help="Only those of this service.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The most that are listed.")] = 100,
    as_json: Json = False,
) -> None:
    """List the open dead letters, the oldest first."""
    letters = operator.run(find_all(_database(), service, limit))
    if as_json:
        print(msgspec.json.encode(letters).decode())  # noqa: T201
        return
    if not letters:
        out.print("No dead letters.")
        return
    for letter in letters:
        when = f"{letter.first_failed_at:%Y-%m-%d %H:%M} UTC"
        tries = "1 attempt" if letter.attempts == 1 else f"{letter.attempts} attempts"
        _line(f"{letter.id}  {letter.state:<9}  {tries}, first {when}", "bold")
        key = f", key {letter.key}" if letter.key else ""
        _line(f"  {letter.consumer} could not handle a message of {letter.source}{key}")
        _line(f"  {letter.error}")
    states = Counter(letter.state for letter in letters)
    out.print(", ".join(f"{count} {state}" for state, count in states.items()), style="bold")
    if len(letters) == limit:
        out.print(f"There may be more than {limit}. To list more: ./claw dlq list --limit {limit * 10}")
    out.print(
        "\n./claw dlq show ID       show headers and payload\n"
        "./claw dlq redrive ID    let the service handle the message again\n"
        "./claw dlq discard ID    never handle the message again"
    )


@app.command()
def show(id: Id, as_json: Json = False) -> None:
    """Show one dead letter with its headers and payload."""
    letter = operator.run(read(_database(), id, _sealing))
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
            # Not wrapped at 80 columns, so that it can be copied.
            out.print(label.append(printable(line), "not bold"), soft_wrap=True)


@app.command("redrive")
def redrive_(
    ids: Annotated[list[UUID] | None, typer.Argument(help="The ids, from `./claw dlq list`.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All failed dead letters of --service.")] = False,
    service: Annotated[str, typer.Option(help="With --all: the service.")] = "",
    force: Annotated[
        bool, typer.Option(help="Also messages that are too old for the service to know if it has handled them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let the service handle dead letters again, and then the messages that wait behind them, in order."""
    if all_ == bool(ids) or all_ != bool(service):
        raise Conflict("give the ids of dead letters, or --all --service NAME for all failed ones of a service")
    count = operator.run(redrive_many(_database(), ids or [], service, force=force))
    if as_json:
        print(msgspec.json.encode({"redriving": count}).decode())  # noqa: T201
    else:
        letters = "1 dead letter is" if count == 1 else f"{count} dead letters are"
        out.print(f"{letters} marked for redrive. The running service handles them: see ./claw dlq list")


@app.command()
def discard(id: Id, as_json: Json = False) -> None:
    """Never handle a dead letter again. The messages that wait behind it are handled."""
    operator.run(discard_one(_database(), id))
    if as_json:
        print(msgspec.json.encode({"discarded": id}).decode())  # noqa: T201
    else:
        out.print(f"{id} is discarded: its row stays, but the message is never handled again.")


async def find_all(url: str, service: str, limit: int) -> list[DeadLetterView]:
    """The open dead letters of all services, or of one. Raises NotFound if the service has no tables."""
    names = await operator.services(url)
    if service and service not in names:
        raise NotFound(f"service {service}: not in this stack, which has {', '.join(names) or 'no services yet'}")
    found: list[DeadLetterView] = []
    for name in [service] if service else names:
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            found += await dead_letters.list_dead_letters(connection, name, limit=limit)
    return sorted(found, key=lambda letter: letter.first_failed_at)[:limit]


async def find(url: str, id_: UUID) -> DeadLetterView:
    """The dead letter with this id, in any service, without its payload. Raises NotFound."""
    for name in await operator.services(url):
        async with operator.database(url, name) as database, database.engine.connect() as connection:
            letter = await dead_letters.get_dead_letter(connection, name, id_)
        if letter:
            return letter
    raise NotFound(f"dead letter {id_}: does not exist; see: ./claw dlq list")


async def read(url: str, id_: UUID, sealing: Callable[[str], Sealing]) -> DeadLetterView:
    """The dead letter with its payload. The reading is audited: the payload may hold a person's words.

    sealing: gets the name of the service that has sealed it.
    """
    letter = await find(url, id_)
    async with operator.database(url, letter.service) as database, database.begin(tenant_id=letter.tenant_id) as tx:
        payload = await dead_letters.read_payload(await tx.connection(), id_, sealing(letter.service))
        audit(tx, operator.actor(), "dead_letter.read", "dead_letter", str(id_), service=letter.service)
    return replace(letter, payload=payload)


async def redrive_many(url: str, ids: Iterable[UUID], service: str = "", *, force: bool = False) -> int:
    """Marks the dead letters `ids` for redrive, or all failed ones of `service` if `ids` is empty.

    Returns the number of dead letters. All of one service are marked in one transaction. Raises NotFound, and Conflict
    if one cannot be redriven.
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
    """Discards the dead letter. Raises NotFound, and Conflict if it is not open."""
    letter = await find(url, id_)
    async with operator.database(url, letter.service) as database, database.begin() as tx:
        await redrive.discard(tx, id_, actor=operator.actor())


def _database() -> str:
    return operator.engines_access()["postgres"]["url"]


def _sealing(service: str) -> Sealing:
    return SealedLetters(Cipher(master_file(keys_folder(Home(home_folder()).place()), service)))


def _line(text: str, style: str = "") -> None:
    """Prints one line, cut at the terminal's width."""
    out.print(Text(printable(text), style), no_wrap=True, overflow="ellipsis")
