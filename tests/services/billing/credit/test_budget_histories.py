"""Any history of a tenant's budgets: limits that change and are removed, holds that end, expire or are charged higher
than reserved, late usage and corrections by hand, also in the second in which a period begins. The amounts that are
spent, held and granted, and the alerts, equal an oracle's."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

import asyncpg
import msgspec
import pytest

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.billing.credit import accounts, budgets
from services.billing.credit.budgets import Scope, Window
from services.billing.credit.holds import HoldRequest, Holds
from services.billing.rating import price_book
from services.billing.usage import corrections
from tests.services.billing.conftest import count
from tests.services.billing.test_histories import Clock
from tooling.testing.platform import Platform

CASES = int(os.environ.get("CLAW_BOOKS_CASES", "12"))
MODULES = ("credit.holds", "plans.subscriptions", "rating.price_book", "usage.corrections", "usage.records")
TOKEN = 10
FIELDS = {"agent": "agent_id", "channel": "channel_id", "session": "session_key", "key": "api_key_id"}
LENGTHS = {"minute": timedelta(minutes=1), "day": timedelta(days=1), "month": timedelta(days=31)}


class ClockedDatabase(Database):
    """A database whose clock is that of the test."""

    clock: Clock

    @asynccontextmanager
    async def begin(self, **named: object) -> AsyncIterator[Tx]:
        async with super().begin(**named) as tx:  # type: ignore[arg-type]
            await tx.sql("SET LOCAL search_path = clocked, billing, public, pg_catalog")
            await tx.sql("SELECT set_config('clocked.now', $1, true)", self.clock.now.isoformat())
            yield tx


@pytest.fixture(scope="module")
async def store(platform: Platform) -> ClockedDatabase:
    await platform.prepare("billing")
    admin = await asyncpg.connect(platform.database_url)
    await admin.execute(
        """
        CREATE SCHEMA clocked;
        GRANT USAGE ON SCHEMA clocked TO PUBLIC;
        CREATE FUNCTION clocked.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE
        AS $$ SELECT current_setting('clocked.now')::timestamptz $$
        """
    )
    await admin.close()
    database = platform.database("billing")
    return ClockedDatabase(database.engine, database.service)


class Key(NamedTuple):
    scope: Scope
    id: str
    period: Window


@dataclass
class Limit:
    id: str
    nanos: int
    soft: list[int]


@dataclass
class Record:
    id: str
    names: dict[str, str]
    cost: int
    rated_at: datetime


@dataclass
class Held:
    nanos: int
    names: dict[str, str]
    expires: datetime


def window(period: str, at: datetime) -> datetime:
    match period:
        case "minute":
            return at.replace(second=0, microsecond=0)
        case "day":
            return at.replace(hour=0, minute=0, second=0, microsecond=0)
        case "month":
            return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return datetime(1970, 1, 1, tzinfo=UTC)


@dataclass
class History:
    store: ClockedDatabase
    rng: random.Random
    clock: Clock
    tenant_id: str = field(default_factory=lambda: str(uuid7()))
    model: str = field(default_factory=lambda: f"acme/{uuid7()}")
    agents: list[str] = field(default_factory=lambda: [str(uuid7()), str(uuid7())])
    channel: str = field(default_factory=lambda: str(uuid7()))
    limits: dict[Key, Limit] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    holds: dict[UUID, Held] = field(default_factory=dict)
    told: list[tuple[str, datetime, int]] = field(default_factory=list)
    """Budget, beginning of its period, percent."""
    due: set[tuple[str, datetime, int]] = field(default_factory=set)

    async def open(self) -> None:
        async with self.store.begin(tenant_id=self.tenant_id) as tx:
            await accounts.open_account(tx, self.tenant_id, "USD", None)
            since = self.clock.now - timedelta(days=60)
            await price_book.add(tx, self.model, "USD", since, {"input_tokens": Decimal(TOKEN)}, (), made_by="test")

    def pass_time(self) -> None:
        rng, now = self.rng, self.clock.now
        if rng.random() < 0.2:
            period = rng.choice([*LENGTHS])
            edge = window(period, window(period, now) + LENGTHS[period])
            self.clock.now = max(now, edge + rng.choice([-1, 0, 1]) * timedelta(seconds=1))
        else:
            self.clock.now += timedelta(seconds=rng.choice([0, rng.randrange(50), rng.randrange(86_400)]))

    def names(self) -> dict[str, str]:
        of = {
            "agent_id": self.rng.choice(["", *self.agents]),
            "channel_id": self.rng.choice(["", self.channel]),
            "session_key": self.rng.choice(["", "s", "t"]),
            "api_key_id": self.rng.choice(["", "k"]),
        }
        return {name: value for name, value in of.items() if value}

    @staticmethod
    def concerns(key: Key, names: dict[str, str]) -> bool:
        return key.scope == "tenant" or names.get(FIELDS[key.scope]) == key.id

    def spent(self, key: Key) -> int:
        since = window(key.period, self.clock.now)
        return sum(one.cost for one in self.records if self.concerns(key, one.names) and one.rated_at >= since)

    def held(self, key: Key) -> int:
        now = self.clock.now
        return sum(one.nanos for one in self.holds.values() if self.concerns(key, one.names) and one.expires > now)

    async def run(self, work: Callable[[Tx], Awaitable[None]]) -> None:
        async with self.store.begin(tenant_id=self.tenant_id) as tx:
            await work(tx)
            for row in tx.messages:
                if row.bus == "kafka" and "budget_id" in (event := msgspec.json.decode(row.body)):
                    self.told.append((event["budget_id"], window(event["period"], self.clock.now), event["percent"]))

    async def act(self) -> None:
        rng = self.rng
        match rng.randrange(9):
            case 0 | 1:
                await self.run(self.limit)
            case 2 if self.limits:
                removed = self.limits.pop(rng.choice([*self.limits]))
                await self.run(lambda tx: budgets.remove(tx, self.tenant_id, UUID(removed.id)))
            case 3 | 4:
                await self.reserve()
            case 5 if self.holds:
                hold_id = rng.choice([*self.holds])
                await Holds(self.store).release(self.tenant_id, hold_id)
                del self.holds[hold_id]
            case 6 | 7:
                await self.run(self.use)
            case 8 if self.records:
                one, nanos = rng.choice(self.records), rng.randrange(-3000, 3000)
                await self.run(
                    lambda tx: corrections.correct(tx, self.tenant_id, nanos, one.id, reason="r", actor="test")
                )
                one.cost -= nanos
        for key, limit in self.limits.items():
            if key.period == "minute" or not (spent := self.spent(key)):
                continue
            since = window(key.period, self.clock.now)
            self.due |= {(limit.id, since, n) for n in (*limit.soft, 100) if limit.nanos * n <= spent * 100}

    async def limit(self, tx: Tx) -> None:
        rng = self.rng
        scope: Scope = rng.choice(["tenant", "agent", "channel", "session", "key"])
        ids = {"tenant": "", "agent": rng.choice(self.agents), "channel": self.channel, "session": "s", "key": "k"}
        key = Key(scope, ids[scope], rng.choice(["minute", "day", "month", "total"]))
        soft = [] if key.period == "minute" else sorted(rng.sample([1, 50, 80, 100], rng.randrange(3)))
        nanos = rng.choice([0, 1000, rng.randrange(10_000), 10**6])
        made = await budgets.set_budget(tx, self.tenant_id, *key, nanos, soft)
        self.limits[key] = Limit(str(made.id), nanos, soft)

    async def reserve(self) -> None:
        names, hold_id, nanos = self.names(), uuid7(), self.rng.randrange(1, 200) * TOKEN
        expires = timedelta(milliseconds=self.rng.choice([1, 30_000, 600_000, 86_400_000]))
        milliseconds = expires // timedelta(milliseconds=1)
        request = HoldRequest(self.model, {"input_tokens": nanos // TOKEN}, milliseconds, **names)
        rests = [
            one.nanos - self.spent(key) - self.held(key)
            for key, one in self.limits.items()
            if self.concerns(key, names)
        ]
        [answer] = await Holds(self.store).reserve(self.tenant_id, {hold_id: request})
        granted = not rests or min(rests) >= nanos
        assert (answer.granted, answer.held_nanos) == (granted, nanos if granted else 0)
        assert answer.available_nanos == (min(rests) - answer.held_nanos if rests else None)
        if granted:
            self.holds[hold_id] = Held(nanos, names, self.clock.now + expires)

    async def use(self, tx: Tx) -> None:
        batch = []
        for _ in range(self.rng.randrange(1, 4)):
            hold_id = self.rng.choice([None, *self.holds])
            names = self.holds.pop(hold_id).names if hold_id else self.names()
            tokens, usage_id = self.rng.randrange(1, 300), f"u/{len(self.records)}"
            batch.append(
                UsageRecorded(
                    tenant_id=self.tenant_id,
                    usage_id=usage_id,
                    resource=self.model,
                    quantities={"input_tokens": tokens},
                    occurred_at=self.clock.now
                    - timedelta(seconds=self.rng.choice([0, self.rng.randrange(40 * 86_400)])),
                    hold_id=hold_id,
                    agent_id=UUID(names["agent_id"]) if "agent_id" in names else None,
                    channel_id=UUID(names["channel_id"]) if "channel_id" in names else None,
                    session_key=names.get("session_key"),
                    api_key_id=names.get("api_key_id"),
                )
            )
            self.records.append(Record(usage_id, names, tokens * TOKEN, self.clock.now))
        await count(tx, batch)


@pytest.mark.parametrize("seed", range(CASES))
async def test_budgets_hold_and_tell_once(store: ClockedDatabase, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = store.clock = Clock()
    for name in MODULES:
        monkeypatch.setattr(f"services.billing.{name}.utcnow", clock, raising=False)
    history = History(store, random.Random(seed), clock)
    await history.open()
    for _ in range(60):
        history.pass_time()
        await history.act()
        async with store.begin(tenant_id=history.tenant_id) as tx:
            found = await budgets.listed(tx, history.tenant_id, after=None, limit=100)
        sums = {Key(one.scope, one.scope_id, one.period): (one.spent_nanos, one.held_nanos) for one in found}
        assert sums == {key: (history.spent(key), history.held(key)) for key in history.limits}
        assert len(history.told) == len(set(history.told)), "told twice"
        live = {one.id for one in history.limits.values()}
        assert {one for one in history.told if one[0] in live} == {one for one in history.due if one[0] in live}
