"""Billing counts every record once, even if it is killed at any transaction boundary."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.clock import utcnow, uuid7
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from tests.services.billing.conftest import Billing, Tenant

TOKEN = 150
# A proof on demand takes more: CLAW_CRASH_RECORDS=200000.
RECORDS = int(os.environ.get("CLAW_CRASH_RECORDS", "3000"))
RECORDS_OF_A_KILL = max(1500, RECORDS // 40)


@pytest.mark.parametrize(
    "place", ["after_effect_before_commit", "before_commit", "after_commit", "after_commit_of_batch"]
)
async def test_killed_at_a_boundary_it_loses_nothing_and_counts_nothing_twice(
    billing: Billing, place: str, tmp_path: Path
) -> None:
    platform = billing.platform
    tenant = await billing.tenant(credit_nanos=100 * TOKEN)
    hold_id = uuid7()
    assert (await tenant.reserve(hold_id=hold_id, input_tokens=80)).granted
    platform.stop("billing")
    for n in range(30):
        # Every third record is reported again in a new message. The last ones exhaust the credit.
        await tenant.use(f"run/{n - n % 3 // 2}", hold_id=hold_id if n == 0 else None, input_tokens=6, output_tokens=0)

    marker = tmp_path / "once"
    marker.touch()
    platform.spawn("billing", CLAW_FAILPOINT=place, CLAW_FAILPOINT_ONCE=str(marker))

    async def killed() -> bool:
        return platform.processes["billing"].poll() is not None

    await platform.until(killed)
    assert not marker.exists()
    await platform.start("billing")

    async def told() -> bool:
        [(count,)] = await tenant.sql(
            "SELECT (SELECT count(*) FROM usage WHERE tenant_id = $1) + "
            "(SELECT count(*) FROM duplicate WHERE tenant_id = $1)",
            tenant.id,
        )
        return bool(count == 30)

    await platform.until(told)
    balance = await tenant.get("balance")
    assert balance["debited_nanos"] == 20 * 6 * TOKEN
    assert (balance["balance_nanos"], balance["held_nanos"]) == (-20 * TOKEN, 0)
    entries = (await tenant.get("ledger"))["items"]
    assert len(entries) == 1 + 20
    assert sum(entry["amount_nanos"] for entry in entries) == balance["balance_nanos"]
    told_once = [
        body for _, body in await platform.outbox("billing", "platform.events") if body["tenant_id"] == tenant.id
    ]
    assert len(told_once) == 1


class Flow:
    """Records of three tenants. A tenth is reported twice, half of these in the same message."""

    def __init__(self, tenants: list[Tenant]) -> None:
        self._tenants = tenants
        self._random = random.Random(14)
        self.due = {tenant.id: 0 for tenant in tenants}
        """The exact price of all records, by the list prices of gpt-4o-mini: 0.15, 0.075 and 0.60 dollars a million."""
        self.made = 0

    async def produce(self, count: int) -> None:
        for first in range(0, count, 500):
            sends = []
            for _ in range(first, min(first + 500, count)):
                tenant = self._random.choice(self._tenants)
                read, wrote = self._random.randrange(1, 50_000), self._random.randrange(5_000)
                cached = self._random.randrange(read)
                record = UsageRecorded(
                    tenant_id=tenant.id,
                    usage_id=f"flow/{self.made}",
                    resource="openai/gpt-4o-mini",
                    quantities={"input_tokens": read, "cached_tokens": cached, "output_tokens": wrote},
                    occurred_at=utcnow(),
                )
                self.made += 1
                self.due[tenant.id] += (read - cached) * 150 + cached * 75 + wrote * 600
                message_id = uuid7()
                for copy in range(1 + (self.made % 10 == 0)):
                    if copy and self.made % 20 == 0:
                        message_id = uuid7()
                    sends.append(tenant.platform.produce(USAGE_RECORDS, record, key=tenant.id, message_id=message_id))
            await asyncio.gather(*sends)


@pytest.mark.timeout(180 + RECORDS // 50)
async def test_the_error_is_zero_after_kills_at_every_boundary_and_rewound_offsets(
    billing: Billing, tmp_path: Path
) -> None:
    platform = billing.platform
    tenants = [await billing.tenant() for _ in range(3)]
    flow = Flow(tenants)
    rng = random.Random(15)
    places = ["after_effect_before_commit", "after_commit_of_batch", "before_commit", "after_commit"]
    partitions = [TopicPartition(platform.prefix + USAGE_RECORDS.name, n) for n in range(USAGE_RECORDS.partitions)]

    async def read() -> bool:
        """All records that were produced so far were read."""
        async with AIOKafkaConsumer(bootstrap_servers=platform.stack.kafka_bootstrap_servers) as log:
            ends = await log.end_offsets(partitions)
        rows = await tenants[0].sql(
            "SELECT partition, next_offset FROM consumer_offset WHERE topic = $1", USAGE_RECORDS.name
        )
        return {partition: end for (_, partition), end in ends.items()} == dict(rows)

    async def killed_or_read() -> bool:
        return platform.processes["billing"].poll() is not None or await read()

    for n in range(RECORDS // RECORDS_OF_A_KILL):
        platform.stop("billing")
        if n:
            # The records of a crashed process and older ones are read again.
            await tenants[0].sql(
                "UPDATE consumer_offset SET next_offset = greatest(0, next_offset - $1) WHERE topic = $2",
                rng.randrange(1, 400),
                USAGE_RECORDS.name,
            )
        platform.spawn("billing", CLAW_FAILPOINT=places[n % len(places)], CLAW_FAILPOINT_PASS=str(rng.randrange(1, 4)))
        await flow.produce(RECORDS_OF_A_KILL)

        await platform.until(killed_or_read, seconds=60 + RECORDS_OF_A_KILL / 100)
        # It may have read all records in fewer passes of the boundary.
        platform.kill("billing")
    await platform.start("billing")
    await platform.until(read, seconds=60 + RECORDS / 200)
    for tenant in tenants:
        [(debited, charged, summed)] = await tenant.sql(
            """
            SELECT debited_nanos,
                   (SELECT -sum(amount_nanos)::bigint FROM ledger_entry WHERE tenant_id = $1 AND kind = 'charge'),
                   (SELECT sum(quantity)::bigint FROM usage_bucket WHERE tenant_id = $1 AND meter = 'cost_nanos')
            FROM account
            WHERE tenant_id = $1
            """,
            tenant.id,
        )
        assert (debited, charged, summed) == (flow.due[tenant.id],) * 3
        # A new client: the token of the first one is too old after a long campaign.
        async with platform.client("billing") as operator:
            rebuilt = await operator.post("/api/v1/billing/usage/rebuild", params={"tenant_id": tenant.id})
        assert (rebuilt.status_code, rebuilt.json().get("equal")) == (200, True), rebuilt.text
