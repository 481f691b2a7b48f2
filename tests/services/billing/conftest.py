"""Billing as a real process, and the messages and requests that tests send to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pypdfium2 import PdfDocument  # type: ignore[import-untyped]

from infra.clock import utcnow, uuid7
from infra.observe.metrics import Metrics
from infra.postgres.tx import Tx
from infra.web import rpc
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from protos.catalog import PLATFORM_EVENTS, USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import MessageReceived
from protos.messages.user import TenantCreated
from services.billing import handlers
from tooling.testing.platform import Platform

METRICS = Metrics(CollectorRegistry())


async def count(tx: Tx, records: Sequence[UsageRecorded], **headers: str) -> None:
    """Handles a batch as the Kafka reader does."""
    tx.origins.update({id(item): {"ce_id": str(uuid7()), **headers} for item in records})
    await handlers.count_usage.handler(list(records), tx, METRICS)


@dataclass
class Tenant:
    """A customer with an account, seen from outside."""

    id: str
    platform: Platform
    http: httpx.AsyncClient
    operator: httpx.AsyncClient
    _ids: dict[str, UUID] = field(default_factory=dict)

    async def get(self, path: str, **params: Any) -> Any:
        response = await self.http.get(f"/api/v1/billing/{path}", params=params)
        assert response.status_code == 200, response.text
        return response.json()

    async def use(
        self,
        usage_id: str,
        resource: str = "openai/gpt-4o-mini",
        *,
        occurred_at: datetime | None = None,
        message_id: UUID | None = None,
        run_id: UUID | None = None,
        hold_id: UUID | None = None,
        **quantities: int,
    ) -> None:
        """Reports usage, like the outbox relay of the agent service."""
        record = UsageRecorded(
            tenant_id=self.id,
            usage_id=usage_id,
            resource=resource,
            quantities=quantities,
            occurred_at=occurred_at or utcnow(),
            run_id=run_id,
            hold_id=hold_id,
        )
        await self.platform.produce(USAGE_RECORDS, record, key=self.id, message_id=message_id)

    async def verdict(self, usage_id: str) -> dict[str, Any]:
        """Waits for the verdict on a record."""

        async def ask() -> dict[str, Any] | None:
            response = await self.http.get(f"/api/v1/billing/verdicts/{usage_id}")
            return response.json() if response.status_code == 200 else None

        found = await self.platform.until(ask)
        assert found
        return found

    def stub(self) -> billing_pb2_grpc.BillingStub:
        channel = self.platform.channels("agent").to(self.platform.grpc("billing"), "billing")
        return billing_pb2_grpc.BillingStub(channel)

    async def reserve(
        self,
        *,
        hold_id: UUID | None = None,
        resource: str = "openai/gpt-4o-mini",
        expires_in_ms: int = 60_000,
        **quantities: int,
    ) -> billing_pb2.ReserveReply:
        request = billing_pb2.ReserveRequest(
            hold_id=str(hold_id or uuid7()), resource=resource, quantities=quantities, expires_in_ms=expires_in_ms
        )
        return await self.stub().Reserve(request, metadata=rpc.tenant_metadata(self.id), timeout=30)

    async def release(self, hold_id: UUID) -> None:
        request = billing_pb2.ReleaseRequest(hold_id=str(hold_id))
        await self.stub().Release(request, metadata=rpc.tenant_metadata(self.id))

    async def sql(self, statement: str, *arguments: Any) -> Any:
        async with self.platform.database("billing").begin() as tx:
            return await tx.sql(statement, *arguments)


class Billing:
    """The running service."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.operator = platform.client("billing")
        self._clients: list[httpx.AsyncClient] = [self.operator]

    def known(self, tenant_id: str) -> Tenant:
        """Returns a client for a tenant, which may have no account yet."""
        client = self.platform.client("billing", tenant_id)
        self._clients.append(client)
        return Tenant(tenant_id, self.platform, client, self.operator)

    async def tenant(self, credit_nanos: int | None = None, currency: str = "USD") -> Tenant:
        """Returns a new tenant with an open account."""
        tenant = self.known(str(uuid7()))
        await self.publish_created(tenant, credit_nanos, currency)

        async def opened() -> bool:
            return (await tenant.http.get("/api/v1/billing/balance")).status_code == 200

        await self.platform.until(opened)
        return tenant

    async def publish_created(self, tenant: Tenant, credit_nanos: int | None, currency: str = "USD") -> None:
        event = TenantCreated(tenant_id=tenant.id, name="Acme", currency=currency, credit_nanos=credit_nanos)
        await self.platform.produce(PLATFORM_EVENTS, event, key=tenant.id, tenant_id=tenant.id)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


@pytest.fixture(scope="module")
async def billing(platform: Platform) -> AsyncIterator[Billing]:
    await platform.prepare("billing")
    await platform.start("billing")
    found = Billing(platform)
    yield found
    await found.close()


def received(channel_id: UUID) -> MessageReceived:
    """A message of a channel of Telegram."""
    return MessageReceived(
        channel_id=channel_id,
        channel_type="telegram",
        agent_id=uuid7(),
        session_key="s",
        conversation_id="c",
        subject_id="p",
        vendor_message_id="1",
        text="hello",
        received_at=utcnow(),
    )


def pdf_pages(content: bytes) -> list[str]:
    """The text of each page, by an independent reader, which reads U+FFFE for a hyphen at the end of a line."""
    document = PdfDocument(content)
    texts = [page.get_textpage().get_text_range() for page in document]
    pages = [text.replace("\r\n", "\n").replace("\ufffe", "-") for text in texts]
    document.close()
    return pages
