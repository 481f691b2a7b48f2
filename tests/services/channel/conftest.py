"""The channel service as a process, and a tenant's view of it for tests."""

from __future__ import annotations

import uuid
from typing import Any
from uuid import UUID

import httpx
import pytest

from infra.clock import uuid7
from protos.catalog import CHANNEL_OUTBOUND
from protos.messages.channel import File, SendMessage
from tooling.testing.platform import Platform

Call = tuple[bytes, dict[str, str]]


class Desk:
    """One tenant's view of the running service."""

    def __init__(self, platform: Platform, tenant_id: str) -> None:
        self.platform = platform
        self.tenant_id = tenant_id

    def client(self) -> httpx.AsyncClient:
        return self.platform.client("channel", self.tenant_id)

    async def connect(self, type_: str, credentials: dict[str, str], api_base: str | None = None) -> dict[str, Any]:
        """A new channel, x."""
        body = {"type": type_, "agent_id": str(uuid7()), "credentials": credentials, "api_base": api_base}
        async with self.client() as http:
            response = await http.post("/api/v1/channels", json=body)
        assert response.status_code == 201, response.text
        channel: dict[str, Any] = response.json()
        return channel

    async def channel(self, id_: str) -> dict[str, Any]:
        async with self.client() as http:
            response = await http.get(f"/api/v1/channels/{id_}")
        found: dict[str, Any] = response.json()
        return found

    async def call(self, channel: dict[str, Any], call: Call, method: str = "POST", **headers: str) -> httpx.Response:
        """Makes a webhook call as the vendor and returns the answer."""
        body, given = call
        async with httpx.AsyncClient(base_url=self.platform.url("channel"), trust_env=False, timeout=30) as http:
            return await http.request(method, channel["webhook_path"], content=body, headers=given | headers)

    async def drained(self) -> None:
        """Returns once no accepted message waits for the drainer."""

        async def ask() -> bool:
            async with self.platform.database("channel").begin() as tx:
                return not await tx.sql("SELECT 1 FROM accepted")

        await self.platform.until(ask)

    async def received(self, channel: dict[str, Any]) -> list[dict[str, Any]]:
        """The messages that were sent to the agent for this channel, in order."""
        await self.drained()
        rows = await self.platform.outbox("channel", "channel.inbound")
        return [body for _, body in rows if body["channel_id"] == channel["id"]]

    async def published(self, channel: dict[str, Any], type_: str) -> list[dict[str, Any]]:
        """The published facts of one type about this channel, in order."""
        await self.drained()
        rows = await self.platform.outbox("channel", "channel.events")
        return [
            body
            for headers, body in rows
            if headers["ce_type"] == f"channel.v1.{type_}" and body["channel_id"] == channel["id"]
        ]

    async def ignored(self, channel: dict[str, Any]) -> list[str]:
        async with self.platform.database("channel").begin() as tx:
            rows = await tx.sql(
                "SELECT ignored FROM inbound_seen WHERE channel_id = $1 AND ignored IS NOT NULL ORDER BY seen_at",
                UUID(channel["id"]),
            )
        return [reason for (reason,) in rows]

    async def reply(
        self,
        inbound: dict[str, Any],
        text: str,
        *,
        delivery_id: UUID | None = None,
        position: int = 0,
        files: tuple[File, ...] = (),
    ) -> UUID:
        """Replies to an inbound message, as the agent would. Returns the id of the delivery."""
        message = SendMessage(
            delivery_id=delivery_id or uuid7(),
            channel_id=UUID(inbound["channel_id"]),
            session_key=inbound["session_key"],
            conversation_id=inbound["conversation_id"],
            text=text,
            run_id=uuid7(),
            reply_to=inbound["vendor_message_id"],
            files=files,
            position=position,
        )
        await self.platform.send(CHANNEL_OUTBOUND, message, tenant_id=self.tenant_id)
        return message.delivery_id

    async def delivery(self, id_: UUID) -> dict[str, Any]:
        async with self.client() as http:
            response = await http.get(f"/api/v1/deliveries/{id_}")
        found: dict[str, Any] = response.json()
        return found

    async def queued(self, id_: UUID) -> None:
        """Returns once the delivery is stored."""

        async def ask() -> bool:
            return "state" in await self.delivery(id_)

        await self.platform.until(ask)

    async def settled(self, id_: UUID) -> dict[str, Any]:
        """Returns the delivery once it has ended."""

        async def ask() -> dict[str, Any] | None:
            found = await self.delivery(id_)
            return found if found.get("state", "queued") != "queued" else None

        found = await self.platform.until(ask)
        assert found is not None
        return found


@pytest.fixture(scope="module")
async def service(platform: Platform) -> Platform:
    """The service, running."""
    await platform.prepare("channel")
    await platform.start("channel")
    return platform


@pytest.fixture
def desk(service: Platform) -> Desk:
    """A new tenant for each test."""
    return Desk(service, str(uuid.uuid4()))
