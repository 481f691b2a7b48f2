"""Concurrent transactions on the same usage or account, and the trace of a charge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from uuid import UUID

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage, Transient
from infra.observe import telemetry
from infra.postgres.database import Database
from infra.postgres.schema import prepare_database
from infra.postgres.tx import Tx
from protos.envelope import Message
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageDelivered
from protos.messages.user import TenantCreated
from protos.topology import Handler
from services.billing import handlers
from services.billing.credit import budgets
from services.billing.credit.holds import HoldRequest, Holds
from tests.services.billing.conftest import METRICS, count, received
from tooling.testing.platform import PASSWORDS, Platform


@pytest.fixture(scope="module")
async def store(platform: Platform) -> Database:
    await platform.prepare("billing")
    return platform.database("billing")


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    running = telemetry.setup("billing", "0", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


def record(tenant_id: str, usage_id: str = "run/1/1", run_id: UUID | None = None) -> UsageRecorded:
    quantities = {"input_tokens": 1, "output_tokens": 0}
    return UsageRecorded(
        tenant_id=tenant_id,
        usage_id=usage_id,
        resource="openai/gpt-4o-mini",
        quantities=quantities,
        occurred_at=utcnow(),
        run_id=run_id,
    )


async def open_account(store: Database, tenant_id: str) -> None:
    event = TenantCreated(tenant_id=tenant_id, name="Acme", currency="USD", credit_nanos=1000)
    async with store.begin(tenant_id=tenant_id) as tx:
        await handlers.open_accounts.handler([event], tx)


async def waits_for_a_lock(store: Database, transactions: int = 1) -> None:
    """Returns as soon as that many transactions of this database wait for another one."""
    async with asyncio.timeout(20):
        while True:
            async with store.begin() as tx:
                [(waiting,)] = await tx.sql(
                    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
                    "AND datname = current_database()"
                )
            if waiting >= transactions:
                return
            await asyncio.sleep(0.02)


async def test_two_batches_with_one_usage_id_at_once_charge_it_once(store: Database) -> None:
    tenant_id = str(uuid7())
    await open_account(store, tenant_id)

    async def second() -> None:
        async with store.begin() as tx:
            await count(tx, [record(tenant_id)])

    async with store.begin() as tx:
        await count(tx, [record(tenant_id)])
        other = asyncio.create_task(second())
        await waits_for_a_lock(store)
    with pytest.raises(Transient, match="at the same time"):
        await other
    await second()
    async with store.begin() as tx:
        assert await tx.sql("SELECT debited_nanos FROM account WHERE tenant_id = $1", tenant_id) == [(150,)]
        assert await tx.sql("SELECT count(*) FROM duplicate WHERE tenant_id = $1", tenant_id) == [(1,)]


def delivered(key: UUID) -> Message:
    return MessageDelivered(delivery_id=uuid7(), channel_id=key, session_key="s", run_id=None, vendor_message_id=None)


def created(key: UUID) -> Message:
    return TenantCreated(tenant_id=str(key), name="Acme", currency="USD", credit_nanos=None)


class RolledBack(Exception):
    pass


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (handlers.note_channel_types.handler, received),
        (partial(handlers.count_messages.handler, metrics=METRICS), delivered),
        (handlers.open_accounts.handler, created),
        (partial(handlers.count_usage.handler, metrics=METRICS), lambda key: record("t", str(key))),
        (partial(handlers.count_usage.handler, metrics=METRICS), lambda key: record(str(key), str(uuid7()))),
    ],
)
async def test_batches_of_parallel_partitions_over_the_same_keys_do_not_deadlock(
    store: Database, handler: Handler, message: Callable[[UUID], Message]
) -> None:
    """One transaction locks the first key and waits for the second; another one has the third key before the first.

    If the handler took the keys in the order of the records, the first transaction would then wait for the third key.
    """
    one, two, three = sorted(uuid7() for _ in range(3))
    await open_account(store, "t")

    async def handle(*keys: UUID) -> None:
        async with store.begin() as tx:
            await run(tx, *keys)

    async def run(tx: Tx, *keys: UUID) -> None:
        messages = [message(key) for key in keys]
        headers = {"tenant_id": "t", "ce_time": utcnow().isoformat()}
        tx.origins.update((id(item), headers | {"ce_id": str(uuid7())}) for item in messages)
        await handler(messages, tx)

    with suppress(RolledBack):
        async with store.begin() as tx:
            await run(tx, two)
            first = asyncio.create_task(handle(one, two, three))
            await waits_for_a_lock(store)
            second = asyncio.create_task(handle(three, one))
            await waits_for_a_lock(store, transactions=2)
            raise RolledBack
    results = await asyncio.gather(first, second, return_exceptions=True)
    # A usage_id that the other transaction has recorded is read again. That is not a deadlock.
    assert [error for error in results if error and "at the same time" not in str(error)] == []


async def test_an_account_opened_while_its_usage_is_rated_leaves_no_record_held(store: Database) -> None:
    tenant_id = str(uuid7())
    async with store.begin() as tx:
        await count(tx, [record(tenant_id)])
        opening = asyncio.create_task(open_account(store, tenant_id))
        await waits_for_a_lock(store)
    await opening
    async with store.begin() as tx:
        assert await tx.sql("SELECT verdict, amount_nanos FROM usage WHERE tenant_id = $1", tenant_id) == [
            ("counted", 150)
        ]


def asked(tokens: int, **names: str) -> HoldRequest:
    return HoldRequest("openai/gpt-4o-mini", {"input_tokens": tokens}, 60_000, **names)


async def test_requests_that_share_a_transaction_are_answered_as_if_each_came_alone(store: Database) -> None:
    tenant_id, same, given_back = str(uuid7()), uuid7(), uuid7()
    await open_account(store, tenant_id)  # with credit for six tokens
    async with store.begin(tenant_id=tenant_id) as tx:
        await budgets.set_budget(tx, tenant_id, "agent", "a", "month", 450, [])
    served = Holds(store)
    results = await asyncio.gather(
        served.reserve(tenant_id, {same: asked(2, agent_id="a")}),
        served.reserve(tenant_id, {same: asked(2, agent_id="a")}),
        served.reserve(tenant_id, {same: asked(1, agent_id="a")}),
        served.reserve(tenant_id, {uuid7(): asked(2, agent_id="a")}),
        served.reserve(tenant_id, {uuid7(): asked(-1)}),
        served.reserve(tenant_id, {given_back: asked(3)}),
        served.reserve(tenant_id, {uuid7(): asked(2)}),
        served.release(tenant_id, given_back),
        served.reserve(tenant_id, {uuid7(): asked(1)}),
        return_exceptions=True,
    )
    assert [
        getattr(result, "field", None)
        or (result and (result[0].granted, result[0].available_nanos, result[0].refused_by))  # type: ignore[index]
        for result in results
    ] == [
        (True, 150, ""),
        (True, 150, ""),
        "hold_id",
        (False, 150, "agent, 0.00000045 a month"),
        "quantities",
        (True, 250, ""),
        (False, 250, ""),
        None,
        (True, 100, ""),
    ]
    assert isinstance(results[2], InvalidMessage)
    async with store.begin() as tx:
        rows = await tx.sql("SELECT outcome, xmin::text FROM hold WHERE tenant_id = $1", tenant_id)
    assert sorted(outcome or "open" for outcome, _ in rows) == ["open", "open", "refused", "refused", "released"]
    assert len({transaction for _, transaction in rows}) == 1, "all are written by one transaction"


async def test_a_charge_has_a_span_in_the_trace_of_the_run_that_caused_it(
    store: Database, spans: InMemorySpanExporter
) -> None:
    tenant_id, trace_id = str(uuid7()), "0af7651916cd43dd8448eb211c80319c"
    await open_account(store, tenant_id)
    with telemetry.process_batch("kafka", "usage.records", []):
        async with store.begin() as tx:
            await count(tx, [record(tenant_id)], traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
            await count(tx, [record(tenant_id, "unsampled")], traceparent=f"00-{trace_id}-b7ad6b7169203331-00")
    [span] = [span for span in spans.get_finished_spans() if span.name == "charge"]
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == trace_id
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes is not None
    assert span.attributes["claw.charge.verdict"] == "counted"
    assert span.attributes["claw.charge.amount_nanos"] == 150
    async with store.begin() as tx:
        rows = await tx.sql("SELECT usage_id, span_id FROM usage WHERE tenant_id = $1 ORDER BY usage_id", tenant_id)
    assert rows == [("run/1/1", f"{span.context.span_id:016x}"), ("unsampled", "")]


async def test_every_table_with_a_tenant_is_bound_to_the_tenant_of_the_request(
    store: Database, platform: Platform
) -> None:
    # A schema that has only the kernel's tables, which have no row-level security.
    await prepare_database(platform.database_url, {"agent": PASSWORDS})
    async with store.begin() as tx:
        tables = await tx.sql(
            "SELECT c.relname, c.relrowsecurity FROM pg_class AS c JOIN pg_attribute AS a ON a.attrelid = c.oid "
            "WHERE c.relnamespace = 'billing'::regnamespace AND c.relkind = 'r' AND a.attname = 'tenant_id' "
            "AND NOT EXISTS (SELECT FROM pg_class WHERE relnamespace = 'agent'::regnamespace AND relname = c.relname)"
        )
    assert len(tables) >= 7
    assert [name for name, bound in tables if not bound] == []
