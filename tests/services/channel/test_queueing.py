"""Deliveries that are queued as a group leave the same rows as deliveries that are queued one by one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import services.channel
from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys, destroy
from protos.messages.channel import SendMessage
from services.channel.deliveries.queueing import EXPIRES, GAPS, DeliveryRequest, queue_delivery, queue_group
from tests.infra.conftest import PASSWORDS

SUBJECTS = SubjectKeys(Cipher("A" * 43 + "="))
CHANNEL = UUID(int=7)
# The rows that a group and single requests must leave alike.
_ROWS = """
SELECT d.session_key, d.id, d.state, (SELECT count(*) FROM event e WHERE e.stream_id = 'delivery:' || d.id),
       (SELECT i.seq FROM lane_item i WHERE i.kind = 'deliveries' AND i.tenant_id = d.tenant_id AND i.item_id = d.id),
       coalesce(q.last, 0),
       (SELECT count(*) FROM early_message e WHERE e.tenant_id = d.tenant_id AND e.key = d.session_key)
FROM delivery d
    LEFT JOIN sequence q ON q.tenant_id = d.tenant_id AND q.key = d.session_key AND q.name = $2
WHERE d.tenant_id = $1
"""


@pytest.fixture
async def database_(database: str) -> AsyncIterator[Database]:
    await prepare_database(database, {"channel": PASSWORDS})
    await migrate(database, "channel", Path(str(services.channel.__file__)).parent / "migrations")
    engine = create_engine(role_url(database, "channel", "worker", PASSWORDS.worker))
    yield Database(engine, "channel")
    await engine.dispose()


async def conversations(database: Database, tenant_id: str, *sessions: str) -> None:
    for session in sessions:
        await database.autocommit(
            "INSERT INTO conversation (session_key, tenant_id, channel_id, subject_id) VALUES ($1, $2, $3, 'writer')",
            session,
            tenant_id,
            CHANNEL,
        )


def asked(tenant_id: str, session: str, position: int, delivery_id: UUID, person: str = "") -> DeliveryRequest:
    message = SendMessage(
        delivery_id=delivery_id,
        channel_id=CHANNEL,
        session_key=session,
        conversation_id="chat",
        text=f"{session} {position}",
        position=position,
        subject_id=person,
    )
    return DeliveryRequest(tenant_id, message, utcnow() + EXPIRES, nullcontext)


async def queue(database: Database, group: list[DeliveryRequest], *, together: bool) -> None:
    if together:
        async with database.begin() as tx:
            await queue_group(tx, SUBJECTS, group)
        return
    for one in group:
        async with database.begin(tenant_id=one.tenant_id) as tx:
            await queue_delivery(tx, SUBJECTS, one.message, one.message.subject_id or "writer", one.expires_at, ())


@pytest.mark.parametrize("seed", range(6))
async def test_a_group_leaves_what_single_requests_leave(database_: Database, seed: int) -> None:
    pick = random.Random(seed)
    # Session, position, number of the delivery, person. Some come too early, some twice, some have no position.
    plan, last = [], dict.fromkeys(range(6), 0)
    for number in range(60):
        session, position = pick.randrange(6), 0
        if pick.random() < 0.9:
            position = last[session] = last[session] + 1
        plan.append((f"{session}", position, number, pick.choice(("", "p", "erased"))))
    for _ in range(8):
        n = pick.randrange(len(plan) - 5)
        plan.insert(n, plan.pop(n + 5))
    # Repeats at the end, when no delivery waits for those before it any more.
    plan += pick.sample(plan, 5)
    found = []
    for together in (True, False):
        tenant_id = f"t-{together}-{seed}"
        ids = [uuid7() for _ in range(60)]
        await conversations(database_, tenant_id, *(f"{tenant_id} {session}" for session in last))
        for batch in range(3):
            if batch == 1:
                async with database_.begin() as tx:
                    await destroy(tx, tenant_id, "erased")
            part = plan[batch * 22 : batch * 22 + 22]
            group = [asked(tenant_id, f"{tenant_id} {s}", position, ids[n], person) for s, position, n, person in part]
            await queue(database_, group, together=together)
        rows = await database_.autocommit(_ROWS, tenant_id, GAPS.name)
        numbers = {id_: number for number, id_ in enumerate(ids)}
        found.append(
            sorted((session.removeprefix(tenant_id), numbers[UUID(str(id_))], *more) for session, id_, *more in rows)
        )
    assert len(found[0]) == 60
    assert found[0] == found[1]


async def test_a_group_takes_a_fixed_number_of_statements(database_: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    await conversations(database_, "counted", *(f"{size} {n}" for size in (1, 50) for n in range(size)))
    statements: list[str] = []
    original = Tx.sql

    async def counted(tx: Tx, statement: str, *arguments: Any) -> Any:
        statements.append(statement)
        return await original(tx, statement, *arguments)

    monkeypatch.setattr(Tx, "sql", counted)
    for size in (1, 50):
        await queue(database_, [asked("counted", f"{size} {n}", 1, uuid7()) for n in range(size)], together=True)
    # Each of the groups: lock and read, write.
    assert len(statements) == 4, statements


async def test_a_request_for_another_conversation_is_invalid_and_changes_nothing(database_: Database) -> None:
    await conversations(database_, "careful", "known")
    group = [asked("careful", "known", 1, uuid7()), asked("careful", "unknown", 1, uuid7())]
    with pytest.raises(InvalidMessage, match="session_key: is not a conversation of this channel"):
        await queue(database_, group, together=True)
    assert await database_.autocommit("SELECT FROM delivery WHERE tenant_id = 'careful'") == []


async def test_groups_over_the_same_conversations_in_opposite_orders_do_not_deadlock(database_: Database) -> None:
    names = [f"crossing {n}" for n in range(20)]
    await conversations(database_, "crossing", *names)
    for _ in range(5):
        ahead = [asked("crossing", name, 0, uuid7()) for name in names]
        behind = [asked("crossing", name, 0, uuid7()) for name in reversed(names)]
        await asyncio.gather(queue(database_, ahead, together=True), queue(database_, behind, together=True))
    [(count,)] = await database_.autocommit("SELECT count(*) FROM delivery WHERE tenant_id = 'crossing'")
    assert count == 200
