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
from infra.service import bulk_redrive, redrive
from infra.service.bulk_redrive import DeadLetterGroup, RedriveCounts
from tooling.cli.output import Json, print_json, printable
from tooling.stack import operator
from tooling.stack.keys import master_file

app = typer.Typer(no_args_is_help=True, help="List, show, redrive and discard messages that could not be processed.")
out = Console(highlight=False)
_MOST_CAUSES = 100_000
_CHOOSE = "give the ids of dead letters, or --all --service NAME for all failed ones of a service, or --cause CAUSE"

Id = Annotated[UUID, typer.Argument(help="The dead letter's id, from `./claw dlq list`.")]


@app.command("list")
def list_(
    service: Annotated[str, typer.Option(help="Only those of this service.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The most that are listed.")] = 100,
    by_cause: Annotated[bool, typer.Option("--by-cause", help="Group those that failed for the same cause.")] = False,
    as_json: Json = False,
) -> None:
    """List the open dead letters, the oldest first."""
    if by_cause:
        _list_causes(service, limit, as_json=as_json)
        return
    letters = operator.run(find_all(_database(), service, limit))
    if as_json:
        print_json(letters)
        return
    if not letters:
        out.print("No dead letters.")
        return
    for letter in letters:
        _line(f"{letter.id}  {letter.state:<9}  since {letter.first_failed_at:%Y-%m-%d %H:%M} UTC", "bold")
        key = f", key {letter.key}" if letter.key else ""
        _line(f"  {letter.consumer} could not handle a message of {letter.source}{key}")
        tries = "1 attempt" if letter.attempts == 1 else f"{letter.attempts} attempts"
        _line(f"  after {tries}: {letter.error}")
    states = Counter(letter.state for letter in letters)
    out.print(", ".join(f"{count} {state}" for state, count in states.items()), style="bold")
    if len(letters) == limit:
        _more("", limit)
    out.print(
        "\n./claw dlq show ID       show headers and payload\n"
        "./claw dlq redrive ID    let the service handle the message again\n"
        "./claw dlq discard ID    never handle the message again"
    )


def _more(option: str, limit: int) -> None:
    out.print(f"There may be more than {limit}. To list more: ./claw dlq list {option}--limit {limit * 10}")


def _list_causes(service: str, limit: int, *, as_json: bool) -> None:
    groups = operator.run(find_causes(_database(), service, limit))
    if as_json:
        print_json([{"service": name} | group._asdict() for name, group in groups])
        return
    if not groups:
        out.print("No dead letters.")
        return
    for name, group in groups:
        counts = f"{group.failed} failed, {group.waiting} waiting, {group.redriving} redriving"
        _line(f"{counts}, first {group.first_failed_at:%Y-%m-%d %H:%M} UTC", "bold")
        out.print(Text(printable(f"  {group.consumer} of {name} could not handle messages of {group.source}")))
        # Not cut, so that it can be copied.
        out.print(Text(f"  {printable(group.cause)}"), soft_wrap=True)
    if len(groups) == limit:
        _more("--by-cause ", limit)
    out.print("\n./claw dlq redrive --cause CAUSE --dry-run    count the messages of a redrive")


@app.command()
def show(id: Id, as_json: Json = False) -> None:
    """Show one dead letter with its headers and payload."""
    letter = operator.run(read(_database(), id, _sealing))
    if as_json:
        print_json(letter)
        return
    shown = msgspec.to_builtins(letter)
    width = max(map(len, shown)) + 1
    for name, value in shown.items():
        if isinstance(value, dict):
            lines = [f"{key}: {text}" for key, text in value.items()]
        else:
            lines = ["–"] if value is None else str(value).split("\n")
        for nth, line in enumerate(lines):
            label = Text("" if nth else name, "bold")
            label.pad_right(width - len(label))
            # Not wrapped at 80 columns, so that it can be copied.
            out.print(label.append(printable(line), "not bold"), soft_wrap=True)


@app.command("redrive")
def redrive_(
    ids: Annotated[list[UUID] | None, typer.Argument(help="The ids, from `./claw dlq list`.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="All failed dead letters of --service.")] = False,
    service: Annotated[str, typer.Option(help="With --all or --cause: the service.")] = "",
    cause: Annotated[
        str, typer.Option(help="All failed ones with this cause, from `./claw dlq list --by-cause`.")
    ] = "",
    rate: Annotated[
        float | None, typer.Option(help="With --all or --cause: how many each service handles in a second.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --all or --cause: only count.")] = False,
    force: Annotated[
        bool, typer.Option(help="Also messages that are too old for the service to know if it has handled them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let the service handle dead letters again, and then the messages that wait behind them, in order."""
    if ids:
        if all_ or service or cause or dry_run or rate is not None:
            raise Conflict(_CHOOSE)
        count = operator.run(redrive_ids(_database(), ids, force=force))
        matched, too_old = count, 0
    else:
        if all_ == bool(cause) or (all_ and not service):
            raise Conflict(_CHOOSE)
        found = operator.run(
            redrive_all(_database(), service, cause or None, rate_per_s=rate, dry_run=dry_run, force=force)
        )
        matched = sum(one.matched for one in found.values())
        count = sum(one.redriven for one in found.values())
        too_old = sum(one.too_old for one in found.values())
    if as_json:
        answer = {"redriving": 0 if dry_run else count, "matched": matched, "too_old": too_old, "dry_run": dry_run}
        print_json(answer)
        return
    if not matched:
        out.print("No failed dead letter matches: see ./claw dlq list --by-cause")
        return
    letters = "1 dead letter" if count == 1 else f"{count} dead letters"
    if dry_run:
        out.print(f"{letters} would be redriven.")
    else:
        are = "is" if count == 1 else "are"
        out.print(f"{letters} {are} marked for redrive. The running service handles them: see ./claw dlq list")
    if too_old:
        out.print(f"{too_old} stay: the service cannot know if it has handled them. To redrive them too: --force")
    if matched > count + too_old:
        out.print(f"{matched - count - too_old} more match: run the command again.")


@app.command()
def discard(id: Id, as_json: Json = False) -> None:
    """Never handle a dead letter again. The messages that wait behind it are handled."""
    operator.run(discard_one(_database(), id))
    if as_json:
        print_json({"discarded": id})
    else:
        out.print(f"{id} is discarded: its row stays, but the message is never handled again.")


async def find_all(url: str, service: str, limit: int) -> list[DeadLetterView]:
    """The open dead letters of all services, or of one. Raises NotFound if the service has no tables."""
    found: list[DeadLetterView] = []
    for name in await _services(url, service):
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


async def find_causes(url: str, service: str, limit: int) -> list[tuple[str, DeadLetterGroup]]:
    """Service and group of the open dead letters with the same cause, the most frequent first. Raises NotFound."""
    found: list[tuple[str, DeadLetterGroup]] = []
    for name in await _services(url, service):
        async with operator.database(url, name) as database, database.begin() as tx:
            # All, because they come with the oldest first.
            found += [(name, group) for group in await bulk_redrive.group_by_cause(tx, limit=_MOST_CAUSES)]
    return sorted(found, key=lambda one: -(one[1].failed + one[1].waiting))[:limit]


async def redrive_ids(url: str, ids: Iterable[UUID], *, force: bool = False) -> int:
    """Marks the dead letters `ids` for redrive. Returns their number. All of one service are marked in one transaction.

    Raises NotFound, and Conflict if one cannot be redriven.
    """
    letters = [await find(url, id_) for id_ in dict.fromkeys(ids)]
    for name in sorted({letter.service for letter in letters}):
        async with operator.database(url, name) as database, database.begin() as tx:
            mine = [letter.id for letter in letters if letter.service == name]
            await redrive.request_redrive(tx, mine, actor=operator.actor(), force=force)
    return len(letters)


async def redrive_all(
    url: str,
    service: str = "",
    cause: str | None = None,
    *,
    rate_per_s: float | None = None,
    dry_run: bool = False,
    force: bool = False,
) -> dict[str, RedriveCounts]:
    """Marks the failed dead letters of the cause, in all services or in one. Returns service → its result.

    Raises NotFound, and InvalidMessage for a wrong rate.
    """
    found = {}
    for name in await _services(url, service):
        async with operator.database(url, name) as database, database.begin() as tx:
            found[name] = await bulk_redrive.redrive_matching(
                tx, actor=operator.actor(), cause=cause, rate_per_s=rate_per_s, dry_run=dry_run, force=force
            )
    return found


async def discard_one(url: str, id_: UUID) -> None:
    """Discards the dead letter. Raises NotFound, and Conflict if it is not open."""
    letter = await find(url, id_)
    async with operator.database(url, letter.service) as database, database.begin() as tx:
        await redrive.discard(tx, id_, actor=operator.actor())


async def _services(url: str, service: str) -> list[str]:
    """`service`, or all services if it is empty. Raises NotFound if the service has no tables."""
    names = await operator.services(url)
    if service and service not in names:
        raise NotFound(f"service {service}: not in this stack, which has {', '.join(names) or 'no services yet'}")
    return [service] if service else names


def _database() -> str:
    return operator.engines_access()["postgres"]["url"]


def _sealing(service: str) -> Sealing:
    return SealedLetters(Cipher(master_file(operator.keys_folder(), service)))


def _line(text: str, style: str = "") -> None:
    """Prints one line, cut at the terminal's width."""
    out.print(Text(printable(text), style), no_wrap=True, overflow="ellipsis")
