"""No two batches deadlock: parallel partitions over the same keys, in opposite orders, with slow rows.

Every table gets a trigger that makes each changed row take a moment. Two transactions that lock the same rows in
different orders then meet in the middle, every time.
"""

from __future__ import annotations

import asyncio
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple
from uuid import UUID, uuid5

import asyncpg
import msgspec
import pytest
from prometheus_client import CollectorRegistry

import services
from infra.bus.batch import Batches
from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from protos.catalog import AGENT_EVENTS, AUDIT_LOGS, CHANNEL_EVENTS, PLATFORM_EVENTS, USAGE_RECORDS
from protos.envelope import Envelope, Message
from protos.messages.agent import RunCompleted
from protos.messages.audit import ActAudited
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageDelivered, MessageReceived
from protos.messages.user import TenantCreated
from protos.topology import Subscription, Topic
from tooling.stack.checkout import CHECKOUT
from tooling.testing.platform import PASSWORDS

KEYS = 12
SLOW = """
SET search_path = "{schema}";
CREATE FUNCTION take_a_moment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN PERFORM pg_sleep(0.005); RETURN NEW; END $$;
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT relname FROM pg_class WHERE relnamespace = '"{schema}"'::regnamespace AND relkind IN ('r', 'p')
        AND NOT relispartition
    LOOP
        EXECUTE format('CREATE TRIGGER take_a_moment BEFORE INSERT OR UPDATE ON %I FOR EACH ROW '
            'EXECUTE FUNCTION take_a_moment()', name);
    END LOOP;
END $$;
"""


class Record(NamedTuple):
    """A record as the consumer hands it out."""

    offset: int
    key: bytes
    headers: list[tuple[str, bytes]]
    value: bytes


def tenant(key: int) -> str:
    return f"tenant {key:02}"


def channel(key: int) -> UUID:
    return uuid5(UUID(int=0), str(key))


def usage(key: int) -> list[Message]:
    record = UsageRecorded(
        tenant_id=tenant(key),
        usage_id=f"{uuid7()}",
        resource="openai/gpt-4o-mini",
        quantities={"input_tokens": 10},
        occurred_at=utcnow(),
    )
    return [record]


def platform(key: int) -> list[Message]:
    return [TenantCreated(tenant_id=tenant(key), name="n", currency="EUR", credit_nanos=None)]


def acts(key: int) -> list[Message]:
    act = ActAudited(
        tenant_id=tenant(key),
        at=utcnow(),
        actor="operator",
        action="a.b",
        object_kind="thing",
        object_id="1",
        outcome="done",
    )
    return [act]


def messages(key: int) -> list[Message]:
    received = MessageReceived(
        channel_id=channel(key),
        channel_type="telegram",
        agent_id=uuid7(),
        session_key=f"s{key}",
        conversation_id="c",
        subject_id="s",
        vendor_message_id="m",
        text="t",
        received_at=utcnow(),
        position=1,
    )
    delivered = MessageDelivered(
        delivery_id=uuid7(), channel_id=channel(key), session_key=f"s{key}", run_id=None, vendor_message_id=None
    )
    return [received, delivered]


def runs(key: int) -> list[Message]:
    return [RunCompleted(run_id=uuid7(), session_key=f"s{key}", reply="r")]


# A new batch handler needs a line here, or the test fails.
MESSAGES: dict[str, Callable[[int], list[Message]]] = {
    USAGE_RECORDS.name: usage,
    PLATFORM_EVENTS.name: platform,
    AUDIT_LOGS.name: acts,
    CHANNEL_EVENTS.name: messages,
    AGENT_EVENTS.name: runs,
}


ADAPTERS = {"metrics": Metrics(CollectorRegistry())}


def batch_handlers() -> dict[str, list[Subscription]]:
    """Service → its batch handlers of topics whose effect is in PostgreSQL."""
    found: dict[str, list[Subscription]] = {}
    for module in pkgutil.iter_modules(services.__path__):
        service = importlib.import_module(f"services.{module.name}.__main__").service
        batches = [s for s in service.subscriptions if s.batch and isinstance(s.source, Topic)]
        handlers = [s for s in batches if not s.at_least_once]
        assert all(service.adapters[s.name].keys() <= ADAPTERS.keys() for s in handlers), (
            "this test does not build them"
        )
        if handlers:
            found[module.name] = [
                replace(s, handler=partial(s.handler, **{name: ADAPTERS[name] for name in service.adapters[s.name]}))
                for s in handlers
            ]
    return found


def records(topic: Topic, first: int, *, backwards: bool) -> list[Record]:
    found: list[Record] = []
    for key in sorted(range(KEYS), reverse=backwards):
        for message in MESSAGES[topic.name](key):
            headers = Envelope(
                id=uuid7(), source="test", type=message.wire_name(), time=utcnow(), tenant_id=tenant(key)
            ).headers()
            raw = [(name, value.encode()) for name, value in headers.items()]
            found.append(Record(first + len(found), f"{key}".encode(), raw, msgspec.json.encode(message)))
    return found


@pytest.mark.parametrize("name", sorted(batch_handlers()))
async def test_parallel_partitions_over_the_same_keys_do_not_deadlock(name: str, database: str) -> None:
    await prepare_database(database, {name: PASSWORDS})
    await migrate(database, name, CHECKOUT / "services" / name / "migrations")
    admin = await asyncpg.connect(database)
    await admin.execute(SLOW.format(schema=name))
    await admin.close()
    engine = create_engine(role_url(database, name, "worker", PASSWORDS.worker))
    topic_id = uuid7()

    # As in a service: the handlers of one group share the position in a topic.
    readers: dict[tuple[str, str], list[Subscription]] = {}
    for handler in batch_handlers()[name]:
        readers.setdefault((handler.group, handler.source.name), []).append(handler)

    async def process(handlers: list[Subscription], partition: int) -> None:
        group, topic = handlers[0].group, handlers[0].source
        assert isinstance(topic, Topic)
        batches = Batches(Database(engine, name), group, topic, partition, handlers, ADAPTERS["metrics"])
        first = await batches.find_position(topic_id, 0, 0)
        # The second batch finds the rows of the first.
        for _ in range(2):
            batch = records(topic, first, backwards=bool(partition))
            await batches.process(topic_id, batch)
            first += len(batch)

    try:
        async with asyncio.TaskGroup() as tasks:
            for handlers in readers.values():
                for partition in (0, 1):
                    tasks.create_task(process(handlers, partition))
        async with engine.connect() as connection:
            assert list(await connection.exec_driver_sql("SELECT error FROM dead_letter")) == []
    finally:
        await engine.dispose()
