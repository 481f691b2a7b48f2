"""The redriver beside operators and other redrivers: the head of a key is always handled first."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres import dead_letters
from infra.postgres.database import Database
from infra.postgres.db import sql
from infra.postgres.dead_letters import DeadLetter, park, store_dead_letters
from infra.postgres.tx import Tx
from infra.security import subjects
from infra.service.redrive import Redriver, discard, discard_expired, request_redrive
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.until import until

GROUP = "sample_ledger"


class Ledger:
    """A handler that records its messages and raises the given errors."""

    def __init__(self) -> None:
        self.got: list[tuple[str, int]] = []
        self.error: Exception | None = None

    async def count(self, notes: list[NoteTaken], tx: Tx) -> None:
        if self.error:
            raise self.error
        self.got += [(note.notebook, note.number) for note in notes]


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def redriver(ledger_database: Database, ledger: Ledger) -> Redriver:
    subscription = SAMPLE_EVENTS.batch(group=GROUP)(ledger.count)
    return Redriver(ledger_database, [subscription], Metrics(CollectorRegistry()))


@pytest.fixture(autouse=True)
async def nothing_left_over(ledger_database: Database) -> None:
    async with ledger_database.begin() as tx:
        await tx.sql("DELETE FROM dead_letter")
        await tx.sql("DELETE FROM parked_key")


async def parked(database: Database, key: str, *states: str) -> None:
    """A parked key with one dead letter for each of `states`."""
    letters = []
    for number, state in enumerate(states, 1):
        envelope = Envelope(id=uuid7(), source="test", type="sample.v1.NoteTaken", time=utcnow(), subject=key)
        letters.append(
            DeadLetter(
                destination=SAMPLE_EVENTS.name,
                place="",
                message_id=str(envelope.id),
                key=key,
                tenant_id=None,
                attempts=1,
                error="",
                headers=msgspec.json.encode(envelope.headers()).decode(),
                payload=msgspec.json.encode(NoteTaken(notebook=key, number=number, text="")),
                state=state,
            )
        )
    async with database.begin() as tx:
        await park(await tx.connection(), GROUP, SAMPLE_EVENTS.name, key)
        await store_dead_letters(await tx.connection(), GROUP, "kafka", letters, database.sealing)


async def states(database: Database, key: str) -> list[str]:
    async with database.begin() as tx:
        rows: Sequence[tuple[str]] = await tx.sql("SELECT state FROM dead_letter WHERE key = $1 ORDER BY seq", key)
    return [state for (state,) in rows]


async def waits_for_a_lock(database: Database) -> None:
    async with database.engine.connect() as connection:
        await until(lambda: sql(connection, "SELECT 1 FROM pg_locks WHERE NOT granted"))


async def test_a_locked_head_is_waited_for_and_not_skipped(
    ledger_database: Database, ledger: Ledger, redriver: Redriver
) -> None:
    await parked(ledger_database, "locked", "redriving", "waiting")
    async with ledger_database.begin() as operator:
        await operator.sql("SELECT FROM dead_letter WHERE key = 'locked' AND state = 'redriving' FOR UPDATE")
        step = asyncio.create_task(redriver.step())
        waiting = asyncio.create_task(waits_for_a_lock(ledger_database))
        await asyncio.wait({step, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert ledger.got == []
    await waiting
    await step
    assert ledger.got == [("locked", 1)]
    while await redriver.step():
        pass
    assert ledger.got == [("locked", 1), ("locked", 2)]


async def test_a_key_with_a_locked_last_letter_stays_parked(ledger_database: Database, redriver: Redriver) -> None:
    await parked(ledger_database, "last", "waiting")
    async with ledger_database.begin() as operator:
        await operator.sql("SELECT FROM dead_letter WHERE key = 'last' FOR UPDATE")
        step = asyncio.create_task(redriver.step())
        waiting = asyncio.create_task(waits_for_a_lock(ledger_database))
        await asyncio.wait({step, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert await operator.sql("SELECT key FROM parked_key WHERE key = 'last'")
    await waiting
    await step
    assert await states(ledger_database, "last") == ["redriven"]
    while await redriver.step():
        pass


async def test_a_failure_does_not_undo_the_success_of_another_redriver(
    ledger_database: Database, ledger: Ledger, redriver: Redriver
) -> None:
    """Between the rollback and the recorded failure, another redriver may handle the dead letter."""
    await parked(ledger_database, "raced", "waiting")
    letter = {"id": None, "consumer": GROUP, "state": "waiting"}
    async with ledger_database.begin() as tx:
        [(letter["id"],)] = await tx.sql("SELECT id FROM dead_letter WHERE key = 'raced'")
    await redriver.step()
    await redriver._failed(letter, RuntimeError("too late"))
    assert await states(ledger_database, "raced") == ["redriven"]
    while await redriver.step():
        pass


async def test_two_redrivers_keep_the_order_of_every_key(
    ledger_database: Database, ledger: Ledger, redriver: Redriver
) -> None:
    for key in ("x", "y", "z"):
        await parked(ledger_database, key, "redriving", *["waiting"] * 5)
    subscription = SAMPLE_EVENTS.batch(group=GROUP)(ledger.count)
    other = Redriver(ledger_database, [subscription], Metrics(CollectorRegistry()))

    async def drain(one: Redriver) -> None:
        while await one.step():
            pass

    await asyncio.gather(drain(redriver), drain(other))
    await drain(redriver)
    for key in ("x", "y", "z"):
        assert [n for k, n in ledger.got if k == key] == [1, 2, 3, 4, 5, 6]
    async with ledger_database.begin() as tx:
        assert not await tx.sql("SELECT key FROM parked_key")


async def test_keys_without_open_letters_are_unparked_without_a_pause(
    ledger_database: Database, redriver: Redriver
) -> None:
    """`step` returns True for an unparked key, so that `run` does not pause between two keys."""
    for n in range(3):
        await parked(ledger_database, f"done {n}")
    assert [await redriver.step() for _ in range(4)] == [True, True, True, False]


async def test_a_dead_letter_of_the_outbox_is_redriven_in_a_service_without_subscriptions(
    ledger_database: Database,
) -> None:
    id_ = uuid7()
    letter = DeadLetter(
        destination=SAMPLE_EVENTS.name,
        place="",
        message_id=str(id_),
        key="unpublished",
        tenant_id=None,
        attempts=1,
        error="",
        headers="{}",
        payload=b"{}",
        state="redriving",
    )
    async with ledger_database.begin() as tx:
        await store_dead_letters(await tx.connection(), GROUP, "outbox", [letter], ledger_database.sealing)
    assert await Redriver(ledger_database, [], Metrics(CollectorRegistry())).step()
    async with ledger_database.begin() as tx:
        rows = await tx.sql("SELECT bus, destination, key, body FROM outbox WHERE message_id = $1", id_)
    assert rows == [("kafka", SAMPLE_EVENTS.name, "unpublished", b"{}")]


async def test_a_failed_head_stays_the_head(ledger_database: Database, ledger: Ledger, redriver: Redriver) -> None:
    await parked(ledger_database, "failing", "failed", "waiting")
    assert not await redriver.step()
    async with ledger_database.begin() as tx:
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE key = 'failing' AND state = 'failed'")
        await request_redrive(tx, [id_], actor="test")
    ledger.error = RuntimeError("not yet")
    assert await redriver.step()
    assert not await redriver.step()
    assert await states(ledger_database, "failing") == ["failed", "waiting"]


async def store(database: Database, tenant_id: str, payload: bytes, state: str = "failed") -> UUID:
    letter = DeadLetter(
        destination="t",
        place="",
        message_id=str(uuid7()),
        key=None,
        tenant_id=tenant_id,
        attempts=1,
        error="ValueError",
        headers="{}",
        payload=payload,
        state=state,
    )
    async with database.begin() as tx:
        await store_dead_letters(await tx.connection(), GROUP, "kafka", [letter], database.sealing)
        [(id_,)] = await tx.sql("SELECT id FROM dead_letter WHERE message_id = $1", letter.message_id)
    return UUID(str(id_))


async def stored(database: Database, id_: UUID) -> bytes:
    async with database.begin() as tx:
        [(payload,)] = await tx.sql("SELECT payload FROM dead_letter WHERE id = $1", id_)
    return bytes(payload)


async def read(database: Database, id_: UUID) -> str:
    async with database.begin() as tx:
        return await dead_letters.read_payload(await tx.connection(), id_, database.sealing)


async def test_a_discarded_dead_letter_keeps_no_payload(ledger_database: Database) -> None:
    id_ = await store(ledger_database, "t1", b"hello canary")
    async with ledger_database.begin() as tx:
        await discard(tx, id_, actor="operator")
    assert await stored(ledger_database, id_) == b""


@pytest.mark.parametrize(
    "payload",
    [
        b'{"subject_id":"person-1","text":"canary"}',
        b'{"text":"canary","subject_id" : "person-2"',
        b"\xff\x00 canary",
        b"",
    ],
)
async def test_a_payload_is_stored_sealed_and_read_whole(ledger_database: Database, payload: bytes) -> None:
    id_ = await store(ledger_database, "t1", payload)
    assert b"canary" not in await stored(ledger_database, id_)
    assert await read(ledger_database, id_) == payload.decode(errors="backslashreplace")


async def test_the_erasure_of_a_subject_reaches_its_dead_letters(ledger_database: Database) -> None:
    words = b'{"subject_id":"person-7","text":"words"}'
    ours = await store(ledger_database, "t1", words)
    broken = await store(ledger_database, "t1", words[:-1])
    other = await store(ledger_database, "t1", words.replace(b"7", b"8"))
    theirs = await store(ledger_database, "t2", words)
    async with ledger_database.begin() as tx:
        await subjects.destroy(tx, "t1", "person-7")
    assert await read(ledger_database, ours) == "[erased]"
    async with ledger_database.begin() as tx:
        await dead_letters.erase(await tx.connection(), "t1", "person-7")
    assert [await stored(ledger_database, id_) for id_ in (ours, broken)] == [b"", b""]
    assert [await read(ledger_database, id_) for id_ in (ours, broken)] == ["[erased]"] * 2
    assert all(["words" in await read(ledger_database, id_) for id_ in (other, theirs)])
    late = await store(ledger_database, "t1", words)
    assert await stored(ledger_database, late) == b"", "a message that fails after the erasure is stored without words"


async def test_a_dead_letter_from_before_payloads_were_sealed_is_read_and_erased(ledger_database: Database) -> None:
    plain = Database(ledger_database.engine, "sample_ledger")
    id_ = await store(plain, "t1", b'{"subject_id":"person-9"}')
    assert await read(ledger_database, id_) == '{"subject_id":"person-9"}'
    async with ledger_database.begin() as tx:
        await dead_letters.erase(await tx.connection(), "t1", "person-9")
    assert await stored(ledger_database, id_) == b""


async def test_a_redrive_of_an_erased_dead_letter_fails_with_the_reason(
    ledger_database: Database, redriver: Redriver
) -> None:
    id_ = await store(ledger_database, "t1", b'{"subject_id":"person-5"}')
    async with ledger_database.begin() as tx:
        await subjects.destroy(tx, "t1", "person-5")
        await request_redrive(tx, [id_], actor="test")
    assert await redriver.step()
    async with ledger_database.begin() as tx:
        [(state, error)] = await tx.sql("SELECT state, error FROM dead_letter WHERE id = $1", id_)
    assert state == "failed"
    assert error == "Conflict: payload: was erased with its person; the dead letter can only be discarded"


async def test_an_open_dead_letter_is_discarded_after_its_time_and_the_act_is_audited(
    ledger_database: Database,
) -> None:
    old, waiting, young = [await store(ledger_database, "t1", b"x", s) for s in ("failed", "waiting", "failed")]
    async with ledger_database.begin() as tx:
        await tx.sql(
            "UPDATE dead_letter SET last_failed_at = now() - interval '31 days' WHERE id = ANY($1::uuid[])",
            [old, waiting],
        )
        await discard_expired(tx)
    async with ledger_database.begin() as tx:
        rows = await tx.sql("SELECT id::text, state FROM dead_letter ORDER BY seq")
        acts = await tx.sql("SELECT body FROM outbox WHERE destination = 'audit.logs'")
    assert rows == [(str(old), "discarded"), (str(waiting), "discarded"), (str(young), "failed")]
    found = [act for (body,) in acts if (act := msgspec.json.decode(body))["object_id"] in (str(old), str(waiting))]
    assert {(act["tenant_id"], act["actor"], act["action"]) for act in found} == {
        ("t1", "service:sample_ledger", "dead_letter.discard")
    }


async def test_old_redriven_dead_letters_are_deleted_and_open_ones_stay(ledger_database: Database) -> None:
    redriven, failed = [await store(ledger_database, "t1", b"x", state) for state in ("redriven", "failed")]
    young = await store(ledger_database, "t1", b"x", "redriven")
    async with ledger_database.begin() as tx:
        await tx.sql(
            "UPDATE dead_letter SET last_failed_at = now() - interval '46 days' WHERE id = ANY($1::uuid[])",
            [redriven, failed],
        )
        await dead_letters.prune(await tx.connection())
        left = {UUID(str(id_)) for (id_,) in await tx.sql("SELECT id FROM dead_letter")}
    assert left == {failed, young}
