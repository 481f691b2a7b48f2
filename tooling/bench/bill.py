"""``bill``: usage records become debits, exactly. Ours is the billing service's handler behind the kernel's reader.

A tenth of the records repeat a usage_id; half of these repeat the whole message. The anchor reads and rates nothing. It
writes the rows that such records leave behind (usage, duplicates, ledger) into the same tables with the same keys: one
connection, COPY of 500 records per transaction. Neither side is traced. After each of our slices the offsets are set
back and the records are read again; then every sum must equal the price of the records.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaProducer
from prometheus_client import CollectorRegistry

import services.billing
from infra.bus.transactional import BATCH, TransactionalReader
from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from protos.catalog import USAGE_RECORDS
from protos.envelope import Envelope
from protos.messages.billing import UsageRecorded
from services.billing import handlers
from services.billing.credit import accounts
from services.billing.rating.domain import cost
from services.billing.rating.price_book import seed
from tooling.bench.fixture import PARTITIONS, Fixture
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Slice, check
from tooling.testing.platform import PASSWORDS

TOPICS = [USAGE_RECORDS.name]
SERVICE = "billing"
# More records than a slice can read. Each slice begins with the first record.
RECORDS = 200_000
TENANTS = 200
RESOURCE = "openai/gpt-4o-mini"
WARM_SECONDS = 0.5
# Records of each partition that are read again after a slice.
REWIND = 2_000

_TABLES = ("usage", "duplicate", "ledger_entry")


class Sent(NamedTuple):
    """A record in the log: the usage that it reports, its message id and its price."""

    usage_id: str
    message_id: str
    amount_nanos: int


@dataclass
class Bill:
    """Both contenders. `prepare` must be called first."""

    fixture: Fixture
    _log: dict[int, list[Sent]] = field(default_factory=lambda: {n: [] for n in range(PARTITIONS)})
    _rows: dict[str, list[list[tuple[Any, ...]]]] = field(default_factory=dict)

    def anchors(self) -> list[Anchor]:
        return [Anchor("COPY of the same rows", 0.5, self._copy)]

    async def prepare(self) -> None:
        """Makes the service's schema, its tenants and the log, and collects the rows that the anchor will write."""
        await prepare_database(self.fixture.admin_url, {SERVICE: PASSWORDS})
        await migrate(self.fixture.admin_url, SERVICE, Path(str(services.billing.__file__)).parent / "migrations")
        await self.fixture.admin.execute(f"SET search_path = {SERVICE}")
        await self._fill()
        async with self._reading(_group()) as count:
            while count() < RECORDS // 4:  # noqa: ASYNC110  # the reader has no signal for its progress
                await asyncio.sleep(0.05)
        await self._take_rows()

    async def ours(self) -> Slice:
        await self._clear()
        group = _group()
        async with self._reading(group) as count:
            async with asyncio.timeout(60):
                while not count():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(WARM_SECONDS)
            began, first = perf_counter(), count()
            await asyncio.sleep(SLICE_SECONDS)
            done, seconds = count() - first, perf_counter() - began
        await self._read_again(group)
        await self._verify()
        return Slice(done, seconds)

    async def _read_again(self, group: str) -> None:
        admin = self.fixture.admin
        before = await admin.fetch("SELECT partition, next_offset FROM consumer_offset")
        await admin.execute("UPDATE consumer_offset SET next_offset = greatest(0, next_offset - $1)", REWIND)
        async with self._reading(group), asyncio.timeout(60):
            for partition, next_offset in before:
                while (  # noqa: ASYNC110
                    await admin.fetchval("SELECT next_offset FROM consumer_offset WHERE partition = $1", partition)
                    < next_offset
                ):
                    await asyncio.sleep(0.05)

    async def _verify(self) -> None:
        """Raises ValueError if a sum differs by a nano-unit from the price of the records that were read so far."""
        admin = self.fixture.admin
        read = [
            sent
            for partition, next_offset in await admin.fetch("SELECT partition, next_offset FROM consumer_offset")
            for sent in self._log[partition][:next_offset]
        ]
        if len(read) > RECORDS * 0.95:
            raise ValueError(f"bill: a slice read all of its {RECORDS} records; raise RECORDS")
        firsts = {sent.usage_id: sent.amount_nanos for sent in reversed(read)}
        messages = len({sent.message_id for sent in read})
        due = sum(firsts.values())
        check(
            "bill, nano-units",
            {
                "due": due,
                "debited": await admin.fetchval("SELECT sum(debited_nanos)::bigint FROM account"),
                "charged": await admin.fetchval("SELECT sum(amount_nanos)::bigint FROM usage"),
                "in the sums by hour": await admin.fetchval(
                    "SELECT sum(quantity)::bigint FROM usage_bucket WHERE meter = 'cost_nanos'"
                ),
                "in the ledger": -await admin.fetchval(
                    "SELECT sum(amount_nanos)::bigint FROM ledger_entry WHERE kind = 'charge'"
                ),
            },
        )
        check(
            "bill, records",
            {
                "messages": messages,
                "verdicts": await admin.fetchval(
                    "SELECT (SELECT count(*) FROM usage WHERE verdict = 'counted') + (SELECT count(*) FROM duplicate)"
                ),
                "uses and repeats": len(firsts) + await admin.fetchval("SELECT count(*) FROM duplicate"),
            },
        )

    async def _copy(self) -> Slice:
        await self._clear()
        admin, done = self.fixture.admin, 0
        began = perf_counter()
        for rows in zip(*(self._rows[table] for table in _TABLES), strict=True):
            if perf_counter() - began > SLICE_SECONDS:
                break
            async with admin.transaction():
                for table, records in zip(_TABLES, rows, strict=True):
                    await admin.copy_records_to_table(table, records=records, schema_name=SERVICE)
            done += len(rows[0]) + len(rows[1])
        seconds = perf_counter() - began
        stored = await admin.fetchval("SELECT (SELECT count(*) FROM usage) + (SELECT count(*) FROM duplicate)")
        check("bill, COPY", {"copied": done, "rows": stored})
        return Slice(done, seconds)

    async def _clear(self) -> None:
        await self.fixture.admin.execute(
            f"TRUNCATE {', '.join(_TABLES)}, usage_bucket, usage_correction, inbox, consumer_offset; "
            "UPDATE account SET debited_nanos = 0"
        )

    async def _take_rows(self) -> None:
        """Takes the rows that our side wrote, divided into the transactions of the anchor."""
        admin = self.fixture.admin
        uses, repeats = await admin.fetchrow("SELECT (SELECT count(*) FROM usage), (SELECT count(*) FROM duplicate)")
        share = uses * BATCH // (uses + repeats)
        for table, size in zip(_TABLES, (share, BATCH - share, share), strict=True):
            order = "entry" if table == "ledger_entry" else "arrival"
            found = await admin.fetch(f"SELECT * FROM {table} ORDER BY {order}")
            rows = [tuple(row) for row in found]
            self._rows[table] = [rows[n : n + size] for n in range(0, len(rows), size)]
        least = min(map(len, self._rows.values()))
        self._rows = {table: batches[:least] for table, batches in self._rows.items()}

    async def _fill(self) -> None:
        engine = create_engine(self._worker_url())
        database = Database(engine, SERVICE)
        tenants = [f"tenant-{n:03}" for n in range(TENANTS)]
        for tenant_id in tenants:
            async with database.begin(tenant_id=tenant_id) as tx:
                await accounts.open_account(tx, tenant_id, "USD", 10**17)
        await engine.dispose()
        rng = random.Random(0)
        price = next(price for price in seed() if price.resource == RESOURCE)
        made: list[tuple[str, bytes, list[tuple[str, bytes]], Sent]] = []
        async with AIOKafkaProducer(
            bootstrap_servers=self.fixture.bootstrap, linger_ms=5, max_batch_size=128 * 1024, compression_type="lz4"
        ) as producer:
            futures = []
            for number in range(RECORDS):
                if number % 10 == 9:
                    tenant_id, body, headers, sent = rng.choice(made)
                    if number % 20 == 9:
                        headers = _headers(tenant_id, message_id := str(uuid7()))
                        sent = sent._replace(message_id=message_id)
                else:
                    tenant_id = rng.choice(tenants)
                    quantities = {"input_tokens": rng.randrange(8_000), "output_tokens": rng.randrange(1_000)}
                    record = UsageRecorded(
                        tenant_id=tenant_id,
                        usage_id=f"{uuid7()}/1/1",
                        resource=RESOURCE,
                        quantities=quantities,
                        occurred_at=utcnow(),
                        run_id=uuid7(),
                    )
                    body, message_id = msgspec.json.encode(record), str(uuid7())
                    headers = _headers(tenant_id, message_id)
                    sent = Sent(record.usage_id, message_id, cost(price, quantities))
                    made.append((tenant_id, body, headers, sent))
                topic = self.fixture.prefix + USAGE_RECORDS.name
                futures.append((await producer.send(topic, body, key=tenant_id.encode(), headers=headers), sent))
            placed = [(await future, sent) for future, sent in futures]
        for place, sent in sorted(placed, key=lambda item: item[0].offset):
            self._log[place.partition].append(sent)

    @asynccontextmanager
    async def _reading(self, group: str) -> AsyncIterator[Any]:
        engine = create_engine(self._worker_url())
        metrics = Metrics(CollectorRegistry())
        reader = TransactionalReader(
            Database(engine, SERVICE),
            group,
            [replace(handlers.count_usage, handler=partial(handlers.count_usage.handler, metrics=metrics))],
            bootstrap=self.fixture.bootstrap,
            metrics=metrics,
            prefix=self.fixture.prefix,
        )
        labels = {"consumer": reader.group, "outcome": "handled"}
        task = asyncio.create_task(reader.run())
        yield lambda: int(metrics.registry.get_sample_value("claw_messages_total", labels) or 0)
        await reader.stop()
        await task
        await engine.dispose()

    def _worker_url(self) -> str:
        return role_url(self.fixture.admin_url, SERVICE, "worker", PASSWORDS.worker)


def _group() -> str:
    """A new consumer group: joining it does not wait for old members."""
    return f"{SERVICE}-{secrets.token_hex(4)}"


def _headers(tenant_id: str, message_id: str) -> list[tuple[str, bytes]]:
    envelope = Envelope(
        id=message_id,  # type: ignore[arg-type]  # only its text is written
        source="agent",
        type=UsageRecorded.wire_name(),
        time=utcnow(),
        subject=tenant_id,
        tenant_id=tenant_id,
        traceparent=None,
    )
    return [(name, value.encode()) for name, value in envelope.headers().items()]
