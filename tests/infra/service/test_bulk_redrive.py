"""Dead letters by their cause, and the redrive of all that share one."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.dead_letters import DeadLetter, park, store_dead_letters
from infra.service.bulk_redrive import DeadLetterGroup, RedriveCounts, group_by_cause, redrive_matching
from infra.service.maintenance import Maintenance
from infra.service.redrive import Redriver
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from tooling.testing.sample.catalog import SAMPLE_EVENTS

GROUP = "sample_ledger"


@pytest.fixture
def got() -> list[str]:
    """The notebooks of the notes that the redriver has handled."""
    return []


@pytest.fixture
def redriver(ledger_database: Database, got: list[str]) -> Redriver:
    async def count(notes: list[NoteTaken], tx: object) -> None:
        got.extend(note.notebook for note in notes)

    return Redriver(ledger_database, [SAMPLE_EVENTS.batch(group=GROUP)(count)], Metrics(CollectorRegistry()))


@pytest.fixture(autouse=True)
async def nothing_left_over(ledger_database: Database) -> None:
    async with ledger_database.begin() as tx:
        for table in ("dead_letter", "parked_key", "outbox"):
            await tx.sql(f"DELETE FROM {table}")


async def failed(
    database: Database, error: str, notebook: str = "n", tenant: str | None = "t1", message_id: str = ""
) -> None:
    envelope = Envelope(id=uuid7(), source="test", type="sample.v1.NoteTaken", time=utcnow(), subject=notebook)
    letter = DeadLetter(
        destination=SAMPLE_EVENTS.name,
        place="",
        message_id=message_id or str(envelope.id),
        key=notebook,
        tenant_id=tenant,
        attempts=1,
        error=error,
        headers=msgspec.json.encode(envelope.headers()).decode(),
        payload=msgspec.json.encode(NoteTaken(notebook=notebook, number=1, text="")),
    )
    async with database.begin() as tx:
        await store_dead_letters(await tx.connection(), GROUP, "kafka", [letter], database.sealing)


async def groups(database: Database, **options: object) -> list[DeadLetterGroup]:
    async with database.begin() as tx:
        return await group_by_cause(tx, **({"limit": 10} | options))  # type: ignore[arg-type]


async def redrive(database: Database, **options: object) -> RedriveCounts:
    async with database.begin() as tx:
        return await redrive_matching(tx, actor="operator", **options)  # type: ignore[arg-type]


async def by_state(database: Database) -> dict[str, int]:
    async with database.begin() as tx:
        return dict(await tx.sql("SELECT state, count(*) FROM dead_letter GROUP BY 1"))


async def acts(database: Database) -> list[dict[str, object]]:
    async with database.begin() as tx:
        rows = await tx.sql("SELECT body FROM outbox WHERE destination = 'audit.logs' ORDER BY position")
    return [msgspec.json.decode(body) for (body,) in rows]


async def test_what_differs_from_message_to_message_is_no_part_of_the_cause(ledger_database: Database) -> None:
    for n in range(3):
        await failed(ledger_database, f"TimeoutError: run {uuid7()} of {'ab12' * 8} after {n}.5 s\nnote {n}")
    await failed(ledger_database, "TimeoutError: too late")
    await failed(ledger_database, "TimeoutError: too late", tenant="t2")
    first, second = await groups(ledger_database)
    assert (first.cause, first.failed) == ("TimeoutError: run # of # after #.# s", 3)
    assert (first.consumer, first.source) == (GROUP, "kafka:sample.events")
    assert (second.cause, second.failed, second.waiting) == ("TimeoutError: too late", 2, 0)
    assert first.first_failed_at < first.last_failed_at < second.last_failed_at
    assert [group.failed for group in await groups(ledger_database, tenant_id="t2")] == [1]
    assert await groups(ledger_database, limit=1) == [first]
    assert await groups(ledger_database, after=first.first_id) == [second]


async def test_a_dry_run_counts_and_a_redrive_marks_those_of_the_cause_only(ledger_database: Database) -> None:
    await failed(ledger_database, "ValueError: 1")
    await failed(ledger_database, "ValueError: 2", tenant="t2")
    await failed(ledger_database, "ValueError: 3", message_id="sha256:x")
    await failed(ledger_database, "KeyError: 'a'")
    assert await redrive(ledger_database, cause="ValueError: #", dry_run=True) == (3, 2, 1)
    assert await redrive(ledger_database, cause="ValueError: #", dry_run=True, force=True) == (3, 3, 0)
    assert await redrive(ledger_database, cause="ValueError: #", dry_run=True, tenant_id="t2") == (1, 1, 0)
    assert (await by_state(ledger_database), await acts(ledger_database)) == ({"failed": 4}, [])
    assert await redrive(ledger_database, cause="ValueError: #") == (3, 2, 1)
    assert await by_state(ledger_database) == {"failed": 2, "redriving": 2}
    [act] = await acts(ledger_database)
    assert (act["actor"], act["action"], act["object_id"]) == ("operator", "dead_letter.redrive_all", "ValueError: #")
    assert act["details"] == {"count": "2", "rate_per_s": ""}
    assert await redrive(ledger_database, cause="ValueError: #", force=True) == (1, 1, 0)
    assert await redrive(ledger_database, cause="ValueError: #", force=True) == (0, 0, 0)
    assert len(await acts(ledger_database)) == 2


@pytest.mark.parametrize("is_parked", [False, True])
async def test_a_slow_redrive_is_handled_one_after_the_other(
    ledger_database: Database, redriver: Redriver, got: list[str], is_parked: bool
) -> None:
    for notebook in ("a", "b"):
        await failed(ledger_database, "ValueError", notebook)
        if is_parked:
            async with ledger_database.begin() as tx:
                await park(await tx.connection(), GROUP, SAMPLE_EVENTS.name, notebook)
    await redrive(ledger_database, cause="ValueError", rate_per_s=0.001)
    while await redriver.step():
        pass
    # The second one is due in 1000 seconds.
    assert got == ["a"]
    async with ledger_database.begin() as tx:
        await tx.sql("UPDATE dead_letter SET redrive_after = redrive_after - interval '1000 seconds'")
    while await redriver.step():
        pass
    assert got == ["a", "b"]
    assert await by_state(ledger_database) == {"redriven": 2}


@pytest.mark.parametrize("rate", [0.0, -1.0, 1001.0, float("nan"), float("inf")])
async def test_a_rate_that_makes_no_sense_is_refused(ledger_database: Database, rate: float) -> None:
    await failed(ledger_database, "ValueError")
    with pytest.raises(InvalidMessage, match="rate_per_s: must be above 0 and at most 1000"):
        await redrive(ledger_database, rate_per_s=rate)
    assert await by_state(ledger_database) == {"failed": 1}


async def test_the_number_and_the_age_of_open_dead_letters_are_measured(ledger_database: Database) -> None:
    metrics = Metrics(CollectorRegistry())
    for _ in range(2):
        await failed(ledger_database, "ValueError")
    async with ledger_database.begin() as tx:
        await tx.sql("UPDATE dead_letter SET first_failed_at = first_failed_at - interval '2 days'")
        await Maintenance(ledger_database, metrics)._observe(tx)

    def value(name: str) -> float:
        return metrics.registry.get_sample_value(name, {"consumer": GROUP}) or 0

    assert value("claw_dead_letters_open") == 2
    assert 2 * 86400 <= value("claw_dead_letter_oldest_seconds") < 3 * 86400
