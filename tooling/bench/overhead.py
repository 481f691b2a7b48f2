"""``overhead``: time from a vendor's webhook to the reply at the vendor, in units of one durable commit.

Channel, agent and billing are the real processes on real engines, and their traces are exported. Vendor and model are
fakes in this process. The model's time is subtracted; the vendor only reads the reply. The load is an open loop at half
of the rate that a burst of webhooks has shown, timed from the moment at which each webhook was due.

Between the slices, while the system is idle, single rows are inserted, each in its own commit: one connection, one
round trip, one fsync.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from infra.clock import uuid7
from protos.catalog import PLATFORM_EVENTS, USAGE_RECORDS
from protos.messages.user import TenantCreated
from services.billing.rating.domain import MESSAGE
from tooling.bench.fixture import PRODUCTION, Fixture, running_platform_on
from tooling.bench.http_load import open_loop, request
from tooling.bench.protocol import Units, check, percentile, units
from tooling.testing.model_server import KEY, ModelServer, model_server
from tooling.testing.platform import Platform
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn

SERVICES = ("channel", "agent", "billing")
GOAL, MEDIAN_GOAL = 150.0, 60.0
CONVERSATIONS = 200
# The first messages open connections and make query plans; they are not timed.
WARM, WARM_RATE = 10, 5.0
# Fewer than CONVERSATIONS: messages that arrive while one is answered would be answered together.
BURST, AT_ONCE = 100, 1e6
SLICE_SECONDS = 4.0
COMMITS = 30
CREDIT_NANOS = 10**15


@dataclass
class Overhead:
    """The running system with one tenant and one channel."""

    fixture: Fixture
    platform: Platform
    models: ModelServer
    vendor: TelegramStandIn | WebhookStandIn
    traced: bool = True
    """Spans are exported, as in production."""
    services: Sequence[str] = SERVICES
    """Those that run."""
    patience: float = 60.0
    """Seconds until all messages must have their replies."""
    tools: Sequence[str] = ()
    """Of the agent."""
    path: str = ""
    """The channel's webhook path."""
    sent: int = 0
    """Webhooks that were sent so far."""
    tenant_id: str = field(default_factory=lambda: str(uuid7()))

    async def prepare(self) -> None:
        await self.fixture.check_durable()
        await self.fixture.admin.execute("CREATE TABLE single (n bigint NOT NULL)")
        await self.platform.prepare(*self.services)
        # With the shorter lease of tests a run can lose its lease and ask the model again.
        endpoint = self.fixture.otlp if self.traced else ""
        await self.platform.start(*self.services, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, **PRODUCTION)
        tenant = TenantCreated(tenant_id=self.tenant_id, name="Bench", currency="USD", credit_nanos=CREDIT_NANOS)
        await self.platform.produce(PLATFORM_EVENTS, tenant, key=self.tenant_id, tenant_id=self.tenant_id)
        await self.platform.until(self._has_account)
        provider = {"base_url": self.models.url, "api_key": KEY}
        agent = await self._make(
            "agent",
            "/api/v1/agents",
            {
                "name": "Helper",
                "model": "openai/gpt-4o-mini",
                "provider": provider,
                "system_prompt": "Be kind.",
                "tools": list(self.tools),
            },
        )
        account = {"agent_id": agent["id"], "credentials": self.vendor.credentials}
        if isinstance(self.vendor, TelegramStandIn):
            account |= {"type": "telegram", "api_base": self.vendor.url}
        else:
            account["type"] = "webhook"
        channel = await self._make("channel", "/api/v1/channels", account)
        self.path = channel["webhook_path"]

    async def measure(self, progress: Callable[[int, int], None], slices: int) -> list[Units]:
        """Raises ValueError unless each webhook had exactly one reply and one usage record."""
        await self.answer(WARM, WARM_RATE)
        rate = BURST / max(await self.answer(BURST, AT_ONCE)) / 2
        waits: list[float] = []
        commits: list[float] = []
        for number in range(slices):
            commits += await self._commits()
            waits += await self.answer(max(1, int(rate * SLICE_SECONDS)), rate)
            progress(number + 1, slices)
        waits.sort()
        p95, commit = percentile(waits, 0.95), median(commits)
        made_of = {
            "p95 ms": p95 * 1000,
            "p50 ms": percentile(waits, 0.5) * 1000,
            "commit ms": commit * 1000,
            "per s": rate,
            "webhooks": len(waits),
        }
        p50 = percentile(waits, 0.5)
        return [
            units("overhead", "webhook to reply, p95", GOAL, p95 / commit, "commits", **made_of),
            units("overhead", "webhook to reply, p50", MEDIAN_GOAL, p50 / commit, "commits"),
        ]

    async def answer(self, count: int, rate: float) -> list[float]:
        """Sends `count` webhooks. Returns for each the seconds until its reply, without the model's time."""
        numbers = range(self.sent, self.sent + count)
        self.sent += count
        requests = [self.webhook(n, n % CONVERSATIONS) for n in numbers]
        began, since = perf_counter() + 0.1, time.time() - perf_counter()
        await open_loop(self.platform.ports["channel"], requests, rate, began=began)
        with suppress(TimeoutError):
            await self.platform.until(self._all_there, seconds=self.patience)
        await self._check()
        arrived = {reply.text: reply.at - since for reply in self.vendor.ledger}
        took = {asked.last_user_text: seconds for asked, seconds in self.models.took}
        return [
            arrived[f"You said: message {n}"] - (began + i / rate) - took[f"message {n}"] for i, n in enumerate(numbers)
        ]

    def webhook(self, n: int, conversation: int) -> bytes:
        """The request with message `n`."""
        text, person = f"message {n}", 1 + conversation
        if isinstance(self.vendor, TelegramStandIn):
            body, headers = self.vendor.update(text, chat=person, person=person)
        else:
            body, headers = self.vendor.message(text, conversation=f"c{person}", user=f"u{person}")
        return request(self.path, headers, body)

    async def _all_there(self) -> bool:
        return min((await self.counts()).values()) >= self.sent

    async def _check(self) -> None:
        check("overhead", await self.counts())
        dead = [
            await self.fixture.admin.fetchval(f'SELECT count(*) FROM "{service}".dead_letter')
            for service in self.services
        ]
        if any(dead) or self.vendor.refusals or self.models.refused:
            raise ValueError(
                f"overhead: dead letters {dead}, refused requests {self.vendor.refusals} {self.models.refused}"
            )

    async def counts(self) -> dict[str, int]:
        produced, counted, usage = await self.fixture.admin.fetchrow(
            # Billing makes the records of delivered messages itself. The agent makes two for a run: its call, its time.
            """
            SELECT (SELECT count(*) / 2 FROM agent.outbox WHERE destination = $1),
                (SELECT count(*) / 2 FROM billing.usage WHERE verdict = 'counted' AND resource <> $2),
                (SELECT count(*) FROM billing.usage WHERE resource <> $2) / 2
                    + (SELECT count(*) FROM billing.duplicate WHERE resource <> $2)
            """,
            USAGE_RECORDS.name,
            MESSAGE,
        )
        return {
            "webhooks": self.sent,
            "replies": len(self.vendor.ledger),
            "different replies": len(set(self.vendor.texts())),
            "model calls": len(self.models.took),
            "usage records": produced,
            "counted": counted,
            "counted or not": usage,
        }

    async def _commits(self) -> list[float]:
        took = []
        for _ in range(COMMITS):
            began = perf_counter()
            await self.fixture.admin.execute("INSERT INTO single VALUES (1)")
            took.append(perf_counter() - began)
        return took

    async def _has_account(self) -> bool:
        async with self.platform.client("billing", self.tenant_id) as http:
            return (await http.get("/api/v1/billing/balance")).status_code == 200

    async def _make(self, service: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.platform.client(service, self.tenant_id) as http:
            made: dict[str, Any] = (await http.post(path, json=body)).raise_for_status().json()
        return made


@asynccontextmanager
async def running(
    place: Fixture, vendor: TelegramStandIn | WebhookStandIn | None = None, *, traced: bool = True
) -> AsyncIterator[Overhead]:
    """vendor: by default Telegram's."""
    async with (
        model_server() as models,
        vendor or TelegramStandIn() as serving,
        running_platform_on(place) as platform,
    ):
        bench = Overhead(place, platform, models, serving, traced=traced)
        await bench.prepare()
        yield bench
