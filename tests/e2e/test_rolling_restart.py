"""`./claw rolling-restart` while clients call the gateway all the time."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from tests.e2e.test_main_job import Company
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import nginx
from tooling.testing.stack import Stack, run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import WebhookStandIn

SERVICES = ("user", "channel", "agent")
# Clients without a pause would take the processors from the services that start.
PAUSE_SECONDS = 0.02
# `./claw rolling-restart nginx` of code that has another template of the configuration.
OF_NEW_CODE = """
import pathlib, sys
from tooling.cli.rolling_restart import rolling_restart
from tooling.stack.engines import nginx
nginx._TEMPLATE = pathlib.Path(sys.argv[1])
rolling_restart(nginx.NAME)
"""


def reload_gateway(home: Path, template: str) -> tuple[int, str]:
    """Exit code and errors of the command, as the stack's user."""
    file = home / "nginx" / "of new code.conf"
    file.write_text(template)
    become = ["setpriv", f"--reuid={home.owner()}", f"--regid={home.group()}", "--clear-groups"]
    command = [*(become if os.geteuid() == 0 else []), sys.executable, "-c", OF_NEW_CODE, str(file)]
    environment = {**os.environ, "CLAW_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, env=environment, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


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

            async def is_served() -> bool:
                async with system.client() as client:
                    return (await client.get("/new")).text == "new"

            template = nginx._TEMPLATE.read_text()
            route = "location = /new { auth_request off; return 200 new; }\n        "
            assert not await is_served()
            with_route = template.replace("location = /_auth {", f"{route}location = /_auth {{")
            assert (await asyncio.to_thread(reload_gateway, system.home, with_route))[0] == 0
            await until(is_served)
            code, error = await asyncio.to_thread(reload_gateway, system.home, "events {")
            assert code
            assert "the gateway goes on with its old configuration" in error
            assert await is_served()
        finally:
            over.set()
            await asyncio.gather(*clients)
            run_claw(system.home, "rolling-restart", "nginx")
        after = Stack(system.home).pids()
        assert set(answers) == {("sent", 200), ("read", 200)}, answers
        assert {name for name in before if before[name] != after[name]} == set(SERVICES)
        assert set(before) == set(after)

        async def all_answered() -> bool:
            return len(hook.ledger) == answers["sent", 200]

        await until(all_answered, seconds=300)
