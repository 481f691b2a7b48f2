"""Messages that are taken in as a group leave the same rows as messages that are taken in one by one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from uuid import UUID

import pytest

import services.agent
from infra.clock import utcnow, uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys, destroy
from services.agent.definitions import store
from services.agent.definitions.models import NewAgent
from services.agent.definitions.queue_modes import QueueMode
from services.agent.handlers import GAPS, _take_one
from services.agent.sessions import domain
from services.agent.sessions.arrivals import Arrival, Origin
from services.agent.sessions.group_intake import Incoming, take_group
from tests.infra.conftest import PASSWORDS

QUEUE_MODES = get_args(QueueMode)
SUBJECTS = SubjectKeys(Cipher("A" * 43 + "="))
# The rows that a group and single messages must leave alike. Runs are numbered in the order of their first message.
_ROWS = """
SELECT m.session_key, m.seq, m.subject_id, m.decides, r.status,
       dense_rank() OVER (PARTITION BY m.session_key ORDER BY f.first), s.messages, s.run_messages, s.run_waits,
       coalesce(q.last, 0),
       (SELECT count(*) FROM early_message e WHERE e.tenant_id = m.tenant_id AND e.key = m.session_key),
       (SELECT array_agg(i.state || ' ' || (i.item_id = m.run_id) ORDER BY i.seq)
        FROM lane l JOIN lane_item i USING (lane_id)
        WHERE l.kind = 'runs' AND l.tenant_id = m.tenant_id AND l.lane = m.session_key)
FROM message m
    JOIN run r ON r.id = m.run_id
    JOIN (SELECT run_id, min(seq) AS first FROM message GROUP BY run_id) f ON f.run_id = m.run_id
    JOIN session s ON s.tenant_id = m.tenant_id AND s.session_key = m.session_key
    LEFT JOIN sequence q ON q.tenant_id = m.tenant_id AND q.key = m.session_key AND q.name = $2
WHERE m.tenant_id = $1
ORDER BY 1, 2
"""


@pytest.fixture
async def database_(database: str) -> AsyncIterator[Database]:
    await prepare_database(database, {"agent": PASSWORDS})
    await migrate(database, "agent", Path(str(services.agent.__file__)).parent / "migrations")
    engine = create_engine(role_url(database, "agent", "worker", PASSWORDS.worker))
    yield Database(engine, "agent")
    await engine.dispose()


def incoming(tenant_id: str, agent_id: UUID, session: str, position: int, person: str = "p") -> Incoming:
    arrival = Arrival(
        message_id=uuid7(),
        agent_id=agent_id,
        session_key=session,
        subject_id=person,
        text=f"{session} {position}",
        received_at=utcnow(),
        origin=Origin(UUID(int=7), "chat", "m"),
    )
    return Incoming(tenant_id, position, arrival, nullcontext)


async def agents(database: Database, tenant_id: str) -> list[UUID]:
    """One agent for each queue mode."""
    made = [uuid7() for _ in QUEUE_MODES]
    async with database.begin(tenant_id=tenant_id) as tx:
        for agent_id, mode in zip(made, QUEUE_MODES, strict=True):
            definition = NewAgent.model_validate({"name": "A", "model": "scripted/answer", "queue_mode": mode})
            await store.insert(tx, agent_id, definition, store.ProviderKeys(), "test")
    return made


async def take(database: Database, group: list[Incoming], *, together: bool) -> None:
    if together:
        async with database.begin() as tx:
            await take_group(tx, SUBJECTS, GAPS.name, group, partial(_take_one, tx, SUBJECTS))
        return
    for one in group:
        async with database.begin(tenant_id=one.tenant_id) as tx:
            await _take_one(tx, SUBJECTS, one)


async def rows(database: Database, tenant_id: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await database.autocommit(_ROWS, tenant_id, GAPS.name)]


@pytest.mark.parametrize("seed", range(8))
async def test_a_group_leaves_what_single_messages_leave(database_: Database, seed: int) -> None:
    tenants = {together: f"t-{together}-{seed}" for together in (True, False)}
    made = {together: await agents(database_, tenant_id) for together, tenant_id in tenants.items()}
    pick = random.Random(seed)
    # Session, position, agent, person. Some come too early, some have no position; any queue mode, an erased person.
    plan, last = [], dict.fromkeys(range(12), 0)
    for _ in range(120):
        session = pick.randrange(12)
        position = 0
        if pick.random() < 0.9:
            position = last[session] = last[session] + 1
        mode = pick.randrange(len(QUEUE_MODES)) if pick.random() < 0.3 else session % len(QUEUE_MODES)
        plan.append((f"s{session}", position, mode, pick.choice(("p", "q", "erased"))))
    for _ in range(10):
        n = pick.randrange(len(plan) - 5)
        plan.insert(n, plan.pop(n + 5))
    for batch in range(3):
        for together, tenant_id in tenants.items():
            if batch == 1:
                async with database_.begin() as tx:
                    await destroy(tx, tenant_id, "erased")
            part = plan[batch * 40 : batch * 40 + 40]
            group = [
                incoming(tenant_id, made[together][mode], session, position, person)
                for session, position, mode, person in part
            ]
            await take(database_, group, together=together)
    together_rows, single_rows = [await rows(database_, tenants[together]) for together in (True, False)]
    assert together_rows
    assert together_rows == single_rows


async def test_the_agent_of_another_tenant_decides_nothing(database_: Database) -> None:
    """Two messages for an agent that the tenant does not have are answered by two runs, and not collected."""
    lent = (await agents(database_, "lender"))[QUEUE_MODES.index("collect")]
    for together in (True, False):
        group = [incoming(f"borrower {together}", lent, "s", position) for position in (1, 2)]
        await take(database_, group, together=together)
    assert await rows(database_, "borrower True") == await rows(database_, "borrower False")
    assert [row[5] for row in await rows(database_, "borrower True")] == [1, 2]


@pytest.mark.parametrize("together", [True, False])
async def test_a_run_that_a_group_fills_waits_for_no_more_messages(
    database_: Database, monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    monkeypatch.setattr(domain, "DEBOUNCE", timedelta(hours=1))
    tenant_id = f"full {together}"
    made = dict(zip(QUEUE_MODES, await agents(database_, tenant_id), strict=True))
    # The run of the first message makes the session busy, so the second run waits until it is full.
    modes = ["followup", *["collect"] * domain.CAP]
    group = [incoming(tenant_id, made[mode], "s", position) for position, mode in enumerate(modes, 1)]
    await take(database_, group, together=together)
    begins = await database_.autocommit(
        "SELECT not_before < now() + interval '30 minutes' FROM lane_item WHERE tenant_id = $1 ORDER BY seq", tenant_id
    )
    assert begins == [(True,), (True,)]


@pytest.mark.parametrize("together", [True, False])
async def test_a_fast_clock_does_not_delay_a_run(
    database_: Database, monkeypatch: pytest.MonkeyPatch, *, together: bool
) -> None:
    monkeypatch.setattr("infra.clock.datetime", SimpleNamespace(now=lambda tz: datetime.now(tz) + timedelta(minutes=5)))
    assert utcnow() > datetime.now(UTC) + timedelta(minutes=4)
    tenant_id = f"fast {together}"
    [agent_id, *_] = await agents(database_, tenant_id)
    await take(database_, [incoming(tenant_id, agent_id, "s", 1)], together=together)
    begins = await database_.autocommit(
        "SELECT not_before < now() + interval '1 minute' FROM lane_item WHERE tenant_id = $1", tenant_id
    )
    assert begins == [(True,)]


async def test_messages_of_new_sessions_take_a_fixed_number_of_statements(
    database_: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    [agent_id, *_] = await agents(database_, "counted")
    statements: list[str] = []
    original = Tx.sql

    async def counted(tx: Tx, statement: str, *arguments: Any) -> Any:
        if tx._pool is database_.engine:
            statements.append(statement)
        return await original(tx, statement, *arguments)

    monkeypatch.setattr(Tx, "sql", counted)
    counts = []
    for size in (2, 100):
        statements.clear()
        group = [incoming("counted", agent_id, f"{size} {n}", 1, f"p{size} {n}") for n in range(size)]
        await take(database_, group, together=True)
        counts.append(len(statements))
    assert counts[0] == counts[1], statements
    assert len(await rows(database_, "counted")) == 102


async def test_groups_over_the_same_sessions_in_opposite_orders_do_not_deadlock(database_: Database) -> None:
    [agent_id, *_] = await agents(database_, "crossing")
    for round_ in range(5):
        names = [f"{round_} {n}" for n in range(20)]
        ahead = [incoming("crossing", agent_id, name, 0) for name in names]
        behind = [incoming("crossing", agent_id, name, 0) for name in reversed(names)]
        await asyncio.gather(take(database_, ahead, together=True), take(database_, behind, together=True))
    assert len(await rows(database_, "crossing")) == 200


async def test_a_message_that_another_transaction_stores_as_early_follows_the_one_that_waits_for_its_lock(
    database_: Database,
) -> None:
    [agent_id, *_] = await agents(database_, "early")
    first, second = (incoming("early", agent_id, "s", position) for position in (1, 2))

    async def waits_for_a_lock() -> None:
        while not await database_.autocommit(
            "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        ):
            await asyncio.sleep(0.02)

    async with database_.begin(tenant_id="early") as tx:
        await _take_one(tx, SUBJECTS, second)
        waiting = asyncio.create_task(take(database_, [first], together=True))
        async with asyncio.timeout(20):
            await waits_for_a_lock()
    await waiting
    found = await rows(database_, "early")
    # Both are stored in their order, the position is behind them, and none waits.
    assert [(seq, last, early) for _, seq, *_, last, early, _ in found] == [(1, 2, 0), (2, 2, 0)]
