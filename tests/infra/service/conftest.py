"""The sample's history, and its live ledger in the test's own process, which a replay rebuilds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from infra.postgres.database import Database
from infra.postgres.db import Pool, create_engine, sql
from infra.postgres.dead_letters import DeadLetterView, list_dead_letters
from infra.postgres.tx import Tx
from infra.service.replay import Replay, ReplayResult
from protos.messages.sample import NoteTaken
from protos.topology import Subscription
from tests.infra.bus.conftest import Buses
from tests.infra.bus.conftest import buses as buses
from tests.infra.conftest import SampleDatabase
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.sample.ledger.handlers import count_notes
from tooling.testing.until import until


class _Front:
    async def Seen(self, request: object) -> None:
        """The front, which these tests ignore."""


@dataclass
class Ledger:
    """The ledger's own handler; it fails on the texts in `refused`."""

    refused: set[str] = field(default_factory=set)

    async def count(self, notes: list[NoteTaken], tx: Tx) -> None:
        for note in notes:
            if note.text in self.refused:
                raise ValueError(f"will not count {note.text!r}")
        await count_notes.handler(notes, tx, _Front())


@dataclass
class History:
    """Facts written by the desk, the ledger's tables made from them, and functions to replay them."""

    admin: Pool
    desk: Database
    buses: Buses
    ledger: Ledger
    subscription: Subscription

    async def write(self, book: str, *texts: str) -> None:
        for text in texts:
            async with self.desk.begin() as tx:
                await tx.decide(NOTEBOOK.stream(book), WriteNote(text))

    async def sql(self, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        async with self.admin.begin() as connection:
            return await sql(connection, statement, *arguments)

    async def caught_up(self) -> None:
        """Waits until each fact of the desk is handled by the ledger or is its dead letter."""

        async def nothing_left() -> bool:
            [(written,)] = await self.sql("SELECT count(*) FROM sample_desk.event")
            [(handled,)] = await self.sql("SELECT count(*) FROM inbox WHERE consumer = 'sample_ledger'")
            # A discarded message is in the inbox too.
            [(aside,)] = await self.sql(
                "SELECT count(*) FROM dead_letter WHERE state IN ('failed', 'waiting') AND source = 'kafka'"
            )
            return bool(written == handled + aside)

        await until(nothing_left)

    async def effects(self, book: str) -> list[tuple[int, int]]:
        """(number of the note, the ledger's count after it), in the order of counting."""
        rows = await self.sql("SELECT number, nth FROM effect WHERE notebook = $1 ORDER BY nth", book)
        return [(number, nth) for number, nth in rows]

    async def letter(self, book: str, state: str) -> DeadLetterView:
        """The first dead letter of this key in this state; waits until there is one."""

        async def found() -> DeadLetterView | None:
            async with self.admin.connect() as connection:
                letters = await list_dead_letters(connection, "sample_ledger")
            return next((letter for letter in letters if (letter.key, letter.state) == (book, state)), None)

        letter: DeadLetterView = await until(found)
        return letter

    def new(self, kind: type[Replay] = Replay, subscription: Subscription | None = None) -> Replay:
        return kind(self.admin, "sample_ledger", subscription or self.subscription, lambda done, total: None)

    async def from_kafka(self, replay: Replay | None = None, *, switch_unequal: bool = False) -> ReplayResult:
        return await (replay or self.new()).from_kafka(
            self.buses.kafka, prefix=self.buses.prefix, switch_unequal=switch_unequal
        )

    async def from_events(self) -> ReplayResult:
        return await self.new().from_events("sample_desk", [NOTEBOOK])


def ledger_subscription(ledger: Ledger | None = None) -> Subscription:
    return SAMPLE_EVENTS.batch(group="sample_ledger", projection=("total", "effect"))((ledger or Ledger()).count)


@pytest.fixture(scope="module")
async def history(
    sample: SampleDatabase, desk: Database, ledger_database: Database, buses: Buses
) -> AsyncIterator[History]:
    """Live: relay, reader and redriver run."""
    ledger = Ledger()
    subscription = ledger_subscription(ledger)
    admin = create_engine(sample.admin_url, schema="sample_ledger")
    async with (
        buses.relay(desk),
        buses.reader(ledger_database, subscription),
        buses.redriver(ledger_database, subscription),
    ):
        yield History(admin, desk, buses, ledger, subscription)
    await admin.dispose()
