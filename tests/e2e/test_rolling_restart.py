"""`./claw rolling-restart` while clients call the gateway all the time."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from uuid import uuid4

import httpx
import pytest

from tests.e2e.test_main_job import Company
from tooling.testing.stack import Stack, run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import WebhookStandIn

SERVICES = ("user", "channel", "agent")
# Clients without a pause would take the processors from the services that start.
PAUSE_SECONDS = 0.02


@pytest.mark.timeout(600)
async def test_services_are_replaced_and_no_client_sees_an_error(system: System) -> None:
    async with AsyncExitStack() as stack:
        hook = await stack.enter_async_context(WebhookStandIn())
        key = await system.tenant("Rolling", credit_nanos=10_000_000_000)
        company = Company(await stack.enter_async_context(system.client(key)))
        agent = await company.agent()
        path = await company.channel("webhook", agent, hook)
        answers: Counter[tuple[str, int]] = Counter()
        over = asyncio.Event()

        async def send(vendor: httpx.AsyncClient) -> int:
            # A conversation of its own: messages of one conversation may share a run and a reply.
            body, headers = hook.message("hello", conversation=str(uuid4()))
            return (await vendor.post(path, content=body, headers=headers)).status_code

        async def read(api: httpx.AsyncClient) -> int:
            return (await api.get(f"/api/v1/agents/{agent}")).status_code

        async def calls() -> None:
            async with system.client() as vendor:
                while not over.is_set():
                    answers["sent", await send(vendor)] += 1
                    # Mostly reads: each message makes a run.
                    for _ in range(20):
                        answers["read", await read(company.api)] += 1
                        await asyncio.sleep(PAUSE_SECONDS)

        clients = [asyncio.create_task(calls()) for _ in range(2)]
        before = Stack(system.home).pids()
        try:
            for name in SERVICES:
                seen = answers.total()
                await asyncio.to_thread(run_claw, system.home, "rolling-restart", name)
                assert answers.total() > seen
        finally:
            over.set()
            await asyncio.gather(*clients)
        after = Stack(system.home).pids()
        assert set(answers) == {("sent", 200), ("read", 200)}, answers
        assert {name for name in before if before[name] != after[name]} == set(SERVICES)
        assert set(before) == set(after)

        async def all_answered() -> bool:
            return len(hook.ledger) == answers["sent", 200]

        await until(all_answered, seconds=300)
