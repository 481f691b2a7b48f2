"""An agent service as a real process, with stand-ins for the services and the model providers that it calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from infra.clock import utcnow, uuid7
from protos.catalog import CHANNEL_CHANGES, CHANNEL_INBOUND
from protos.messages.channel import MessageChanged, MessageReceived
from services.agent.runs.metering import RESOURCE
from tooling.testing.model_server import KEY, ModelServer, model_server
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import ServiceFakes, running_service_fakes

MODEL = "gpt-4o-mini"
OVER = ("completed", "failed", "cancelled", "refused", "indeterminate")


@dataclass
class World:
    """The agent service and everything that it calls."""

    platform: Platform
    models: ModelServer
    peers: ServiceFakes

    def tenant(self) -> Tenant:
        """A tenant of its own."""
        return Tenant(self, f"t-{uuid7()}")


@dataclass
class Tenant:
    """One tenant's view of the service."""

    world: World
    id: str

    async def call(
        self, method: str, path: str, *, expect: int | None = None, who: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """The JSON answer; raises AssertionError unless the status is `expect` (default: below 300).

        who: the client's actor, scopes and groups; None: one with all scopes.
        """
        async with self.world.platform.client("agent", self.id, **(who or {})) as client:
            answer: httpx.Response = await client.request(method, path, **kwargs)
        ok = answer.status_code == expect if expect else answer.status_code < 300
        assert ok, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def agent(self, **fields: Any) -> str:
        """A new agent on the model server. Returns its id."""
        body = {
            "name": "Helper",
            "model": f"openai/{MODEL}",
            "provider": {"base_url": self.world.models.url, "api_key": KEY},
            "system_prompt": "Be kind.",
        } | fields
        return str((await self.call("POST", "/api/v1/agents", json=body))["id"])

    async def say(self, agent: str, text: str, session: str = "s", **body: Any) -> str:
        """Writes by the API. Returns the run."""
        path = f"/api/v1/agents/{agent}/sessions/{session}/messages"
        return str((await self.call("POST", path, json={"text": text} | body))["run_id"])

    async def receive(
        self,
        agent: str,
        text: str,
        *,
        chat: str = "c",
        message_id: UUID | None = None,
        person: str = "person-1",
        position: int = 0,
        trace_id: str | None = None,
        parent: str | None = None,
        thread_run_id: str | None = None,
        by_admin: bool = False,
        approvers: tuple[str, ...] = (),
        seconds_late: float = 0,
        words: str = "",
        for_others: bool = False,
        in_album: bool = False,
        vendor_message_id: str = "m1",
    ) -> UUID:
        """A message from a channel, as the channel service's relay sends it. It was under way for `seconds_late`."""
        message = MessageReceived(
            channel_id=UUID(int=7),
            channel_type="telegram",
            agent_id=UUID(agent),
            session_key=f"{self.id}-{chat}",
            conversation_id=chat,
            subject_id=person,
            vendor_message_id=vendor_message_id,
            text=text,
            received_at=utcnow() - timedelta(seconds=seconds_late),
            position=position,
            parent_session_key=f"{self.id}-{parent}" if parent else "",
            thread_run_id=UUID(thread_run_id) if thread_run_id else None,
            by_admin=by_admin,
            approvers=approvers,
            words=words,
            for_others=for_others,
            in_album=in_album,
        )
        queue = CHANNEL_INBOUND["telegram"]
        traceparent = f"00-{trace_id}-{'1' * 16}-01" if trace_id else None
        return await self.world.platform.send(
            queue, message, tenant_id=self.id, message_id=message_id, traceparent=traceparent
        )

    async def change(
        self,
        agent: str,
        message_id: UUID,
        text: str | None,
        *,
        position: int = 0,
        order: int = 1,
        has_files: bool = False,
        person: str = "person-1",
        vendor_message_id: str = "m1",
    ) -> UUID:
        """The person edits a message of `receive`, or deletes it (None)."""
        changed = MessageChanged(
            channel_id=UUID(int=7),
            agent_id=UUID(agent),
            session_key=f"{self.id}-c",
            conversation_id="c",
            subject_id=person,
            vendor_message_id=vendor_message_id,
            message_id=message_id,
            position=position,
            deleted=text is None,
            text=text or "",
            has_files=has_files,
            order=order,
            changed_at=utcnow(),
        )
        return await self.world.platform.send(CHANNEL_CHANGES, changed, tenant_id=self.id)

    async def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("GET", f"/api/v1/runs/{run_id}")
        return found

    async def over(self, run_id: str) -> dict[str, Any]:
        """The run once it has ended."""

        async def ended() -> dict[str, Any] | None:
            found = await self.run(run_id)
            return found if found["status"] in OVER else None

        found = await self.world.platform.until(ended)
        assert found
        return found

    async def runs(self, count: int, **query: Any) -> list[dict[str, Any]]:
        """The tenant's runs, the oldest first, once `count` of them have ended."""

        async def ended() -> list[dict[str, Any]] | None:
            items = (await self.call("GET", "/api/v1/runs", params=query))["items"]
            done = [item for item in items if item["status"] in OVER]
            return done[::-1] if len(done) >= count else None

        found = await self.world.platform.until(ended)
        assert found
        return found

    async def sent(self, destination: str) -> list[dict[str, Any]]:
        """The bodies that the agent has written for a topic or an exchange, of this tenant, in order."""
        return [
            body
            for headers, body in await self.world.platform.outbox("agent", destination)
            if headers.get("tenant_id") == self.id
        ]

    async def usage(self) -> list[dict[str, Any]]:
        """The usage records of the agent's calls."""
        return [record for record in await self.sent("usage.records") if record["resource"] != RESOURCE]

    async def seconds(self) -> dict[str, int]:
        """The seconds that were recorded of each run."""
        records = [record for record in await self.sent("usage.records") if record["resource"] == RESOURCE]
        found = {record["run_id"]: record["quantities"]["run_seconds"] for record in records}
        assert [record["usage_id"] for record in records] == [f"{run_id}/seconds" for run_id in found]
        return found


@asynccontextmanager
async def running_agent(platform: Platform, *others: str, **environment: str) -> AsyncIterator[World]:
    """The agent service, started, and `others` beside it."""
    await platform.prepare("agent", *others)
    async with model_server() as models, running_service_fakes(platform) as peers:
        await platform.start("agent", *others, **environment)
        yield World(platform, models, peers)
        # Before the servers that it calls.
        await asyncio.to_thread(platform.stop, "agent")
        assert models.refused == []


@pytest.fixture(scope="module")
async def world(platform: Platform) -> AsyncIterator[World]:
    async with running_agent(platform) as world:
        yield world


@pytest.fixture
def tenant(world: World) -> Iterator[Tenant]:
    yield world.tenant()
    # A run that was cancelled before it asked the model leaves its answer, which another test would get.
    world.models.forget()
