"""``intake``: CPU time of the agent and of PostgreSQL to take in one message from RabbitMQ.

The agent is the real service without its lanes (``intake_agent``), so it stores message, session, run and lane item,
and executes no run. Tracing is on. A slice publishes messages of new conversations and ends when all are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from statistics import median
from time import perf_counter
from uuid import UUID

import aio_pika
import msgspec

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_INBOUND
from protos.envelope import Envelope
from protos.messages.channel import MessageReceived
from services.agent.lanes import RUNS
from tooling.bench import cpu
from tooling.bench.fixture import PRODUCTION, Fixture, running_platform_on
from tooling.bench.protocol import Units, check, median_units
from tooling.testing.platform import Platform
from tooling.testing.processes import Process

SERVICE = "agent"
QUEUE = CHANNEL_INBOUND["telegram"]
TENANTS = 20
MESSAGES = 400
AT_ONCE = 200
WAIT_SECONDS = 120.0
# An eighth of the 21 ms that one transaction per message cost before messages were taken in groups.
GOAL_MS = 21 / 8


class Intake:
    """The running service with an agent for each tenant."""

    def __init__(self, fixture: Fixture, platform: Platform) -> None:
        self.fixture = fixture
        self.platform = platform
        self.agents: dict[str, UUID] = {}
        self.published = 0

    async def prepare(self) -> None:
        await self.fixture.check_durable()
        await self.platform.prepare(SERVICE)
        variables = {
            **self.platform.environment(SERVICE),
            **PRODUCTION,
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.fixture.otlp,
        }
        log = self.platform.folder / f"{SERVICE}.log"
        self.platform.processes[SERVICE] = Process("tooling.bench.intake_agent", variables, log)
        await self.platform.ready(SERVICE)
        for _ in range(TENANTS):
            tenant_id = str(uuid7())
            async with self.platform.client(SERVICE, tenant_id) as http:
                body = {"name": "Helper", "model": "scripted/answer", "system_prompt": "Be kind."}
                made = (await http.post("/api/v1/agents", json=body)).raise_for_status().json()
            self.agents[tenant_id] = UUID(made["id"])

    async def measure(self, progress: Callable[[int, int], None], slices: int, messages: int = MESSAGES) -> list[Units]:
        """Raises ValueError unless each message has exactly one run."""
        await self.slice(messages)
        found = []
        rates = []
        for number in range(slices):
            began = perf_counter()
            found.append(await self.slice(messages))
            rates.append(messages / (perf_counter() - began))
            progress(number + 1, slices)
        agent = [one[SERVICE] for one in found]
        postgres = [one["postgres"] for one in found]
        both = [sum(pair) for pair in zip(agent, postgres, strict=True)]
        made_of = {"messages per CPU second": 1000 / median(both), "messages per s": median(rates)}
        return [
            median_units("intake", "CPU of agent and PostgreSQL", GOAL_MS, both, "ms", **made_of),
            median_units("intake", "CPU of the agent", None, agent, "ms"),
            median_units("intake", "CPU of PostgreSQL", None, postgres, "ms"),
        ]

    async def slice(self, messages: int) -> dict[str, float]:
        """Milliseconds of CPU per message of each process."""
        before = cpu.of_all(self.fixture.stack, self.platform)
        await self._publish(messages)
        await self.platform.until(self._all_stored, seconds=WAIT_SECONDS)
        used = cpu.difference(before, cpu.of_all(self.fixture.stack, self.platform))
        check("intake", await self._counts())
        return {name: seconds * 1000 / messages for name, seconds in used.items()}

    async def _all_stored(self) -> bool:
        return bool(await self.fixture.admin.fetchval("SELECT count(*) FROM agent.run") >= self.published)

    async def _counts(self) -> dict[str, int]:
        rows = await self.fixture.admin.fetchrow(
            """
            SELECT (SELECT count(*) FROM agent.run) AS runs,
                (SELECT count(*) FROM agent.message) AS messages,
                (SELECT count(*) FROM agent.lane_item WHERE kind = $1) AS "lane items",
                (SELECT count(DISTINCT session_key) FROM agent.message) AS conversations
            """,
            RUNS.name,
        )
        return {"published": self.published, **dict(rows)}

    async def _publish(self, count: int) -> None:
        connection = await aio_pika.connect(self.platform.rabbitmq_url)
        tenants = list(self.agents)
        async with connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(QUEUE.exchange.name, ensure=False)
            numbers = range(self.published, self.published + count)
            for first in range(0, count, AT_ONCE):
                part = numbers[first : first + AT_ONCE]
                await asyncio.gather(
                    *(
                        exchange.publish(self._message(n, tenants[n % TENANTS]), routing_key=QUEUE.routing_key)
                        for n in part
                    )
                )
        self.published += count

    def _message(self, number: int, tenant_id: str) -> aio_pika.Message:
        received = MessageReceived(
            channel_id=uuid7(),
            channel_type="telegram",
            agent_id=self.agents[tenant_id],
            session_key=f"session-{number}",
            conversation_id=str(number),
            subject_id=f"person-{number}",
            vendor_message_id=str(number),
            text="x" * 300,
            received_at=utcnow(),
            position=1,
        )
        envelope = Envelope(
            id=uuid7(),
            source="channel",
            type=received.wire_name(),
            time=utcnow(),
            subject=None,
            tenant_id=tenant_id,
            traceparent=f"00-{uuid7().hex}-{uuid7().hex[16:]}-01",
        )
        return aio_pika.Message(
            msgspec.json.encode(received),
            headers=dict(envelope.headers()),
            message_id=str(envelope.id),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )


@asynccontextmanager
async def running(place: Fixture) -> AsyncIterator[Intake]:
    async with running_platform_on(place) as platform:
        bench = Intake(place, platform)
        await bench.prepare()
        yield bench
