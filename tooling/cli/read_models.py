"""The read models that ``./claw replay`` verifies in place, and the list of all."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from infra.postgres.db import sql
from infra.security.audit import audit
from infra.service import verification
from infra.service.service import Service
from infra.service.verification import LastVerification, VerificationResult
from services.log_aggregator.index import reindexing
from services.log_aggregator.index.reindexing import INDEXED, Indexed
from services.log_aggregator.index.search_index import SearchIndex
from tooling.cli.output import Progress, print_json, printable
from tooling.stack import operator

out = Console(highlight=False)

Access = dict[str, dict[str, str]]
"""The administrator's access to each engine."""
Verification = Callable[[verification.Progress], Coroutine[Any, Any, VerificationResult]]


class Listed(LastVerification, frozen=True, kw_only=True):
    """A read model in the list."""

    name: str
    source: str
    """events, rows, or a topic."""
    rows: int | None
    """None: an index whose documents were never counted."""

    @property
    def result(self) -> str:
        paused = "" if self.under_way is None else f"; paused after {self.under_way}"
        if self.different is None:
            return f"never{paused}"
        return (f"{self.different} differ" if self.different else "equal") + paused


class Declared(msgspec.Struct, frozen=True):
    service: str
    name: str
    source: str
    tables: tuple[str, ...] = ()
    indexed: Indexed | None = None


def declared(services: Iterable[Service]) -> Iterator[Declared]:
    """Every read model of these services."""
    for service in services:
        for model in service.read_models:
            yield Declared(service.name, model.name, "events" if model.events else "rows", (model.table,))
        for subscription in service.subscriptions:
            if subscription.projection:
                handler = subscription.name.rpartition(".")[2]
                yield Declared(service.name, handler, subscription.source.name, subscription.projection)
        if service.name == "log_aggregator":
            yield from (Declared(service.name, one.name, one.topic.name, indexed=one) for one in INDEXED)


async def find_all(access: Access, services: Iterable[Service]) -> list[Listed]:
    """The read models of the services whose schemas are in the database."""
    found = []
    url = access["postgres"]["url"]
    schemas = await operator.services(url)
    for one in declared(services):
        if one.service not in schemas:
            continue
        async with operator.database(url, one.service) as database, database.engine.connect() as connection:
            known = (await verification.last(connection)).get(one.name, LastVerification())
            counts = [(await sql(connection, f'SELECT count(*) FROM "{table}"'))[0][0] for table in one.tables]
            # Documents of several topics are in one index: those that were compared are counted.
            rows = known.compared if one.indexed else sum(counts)
        fields = msgspec.structs.asdict(known)
        found.append(Listed(**fields, name=f"{one.service}.{one.name}", source=one.source, rows=rows))
    return found


def show(found: list[Listed], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False)
    # The source is in the JSON: it would leave no room for the result.
    for column in ("name", "rows", "verified (UTC)"):
        table.add_column(column, justify="right" if column == "rows" else "left", no_wrap=True)
    table.add_column("result")
    for one in found:
        at = f"{one.verified_at:%m-%d %H:%M}" if one.verified_at else ""
        table.add_row(one.name, "–" if one.rows is None else str(one.rows), at, one.result)
    out.print(table)


def verification_of(access: Access, service: Service, name: str, *, switch: bool, restart: bool) -> Verification | None:
    """The verification of a read model in place; None if the service has no such read model."""
    url = access["postgres"]["url"]
    for model in service.read_models:
        if model.name == name:

            async def rows(tell: verification.Progress, model: Any = model) -> VerificationResult:
                async with operator.database(url, service.name) as database:
                    return await verification.verify(
                        database.engine, service.name, model, switch=switch, restart=restart, progress=tell
                    )

            return rows
    for indexed in INDEXED if service.name == "log_aggregator" else ():
        if indexed.name == name:

            async def documents(tell: verification.Progress, indexed: Indexed = indexed) -> VerificationResult:
                prefix = os.environ.get("CLAW_TOPIC_PREFIX", "")
                async with (
                    operator.database(url, service.name) as database,
                    aclosing(SearchIndex(access["opensearch"]["url"], prefix)) as index,
                ):
                    return await reindexing.verify(
                        database.engine,
                        index,
                        indexed,
                        bootstrap=access["kafka"]["bootstrap_servers"],
                        prefix=prefix,
                        switch=switch,
                        restart=restart,
                        progress=tell,
                    )

            return documents
    return None


def verify(access: Access, name: str, work: Verification, *, switch: bool, as_json: bool) -> None:
    """Runs a verification, and shows its progress and its result. Raises Exit with 1 if rows differ and stay."""
    seen = 0
    try:
        with Progress() as progress:
            progress.show(f"verify {name}")

            def tell(done: int, total: int) -> None:
                nonlocal seen
                seen = done
                progress.count(f"parts of the source of {name}", done, total)

            verified = operator.run(_audited(access, name, work(tell)))
    except KeyboardInterrupt:
        out.print(f"Paused after {seen} parts of the source. The same command goes on.", soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_json(verified)
    else:
        _tell(name, verified, switch=switch)
    if verified.left:
        raise typer.Exit(1)


async def _audited(access: Access, name: str, work: Coroutine[Any, Any, VerificationResult]) -> VerificationResult:
    """Writes an audit record for a repair."""
    verified = await work
    if verified.repaired:
        url, service = access["postgres"]["url"], name.partition(".")[0]
        async with operator.database(url, service) as database, database.begin() as tx:
            audit(tx, operator.actor(), "projection.repair", "projection", name, rows=str(verified.repaired))
    return verified


def _tell(name: str, verified: VerificationResult, *, switch: bool) -> None:
    verdict = f"[red]{verified.different} differ[/]" if verified.different else "[green]equal[/]"
    out.print(f"{name}: {verdict}, live {verified.rows} rows, rebuilt {verified.rebuilt_rows}")
    for one in verified.differences[:20]:
        out.print(f"  {printable(one.key)}: {one.what}", markup=False)
    if verified.different > 20:
        out.print(f"  and {verified.different - 20} more")
    if verified.repaired:
        out.print(f"Repaired {verified.repaired} rows.")
    if verified.left and not switch:
        out.print("Nothing was changed. To repair these rows: --switch.")
    elif verified.left:
        out.print(f"{verified.left} rows cannot be repaired: they have columns that no event has.")
