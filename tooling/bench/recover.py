"""``recover``: time from SIGKILL of a service to its next accepted message, on a system that `./claw up` has started.

The supervisor restarts the service, and its start includes all imports. A vendor sends one webhook directly after the
kill and repeats it until it is answered 200. The channel has recovered with that 200, the agent with the reply at the
vendor, billing with the charge of the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

import httpx

from tooling.bench.protocol import Units, median_units
from tooling.testing.model_server import KEY, ModelServer, model_server
from tooling.testing.stack import Stack, run_claw
from tooling.testing.system import Company, System
from tooling.testing.until import until
from tooling.testing.vendors import TelegramStandIn

# Half of the times before the hot paths were rebuilt: 5 s and 9 s on two quiet cores.
GOALS = {"channel": 2.5, "agent": 4.5, "billing": None}
WAIT_SECONDS = 120.0
POLL_SECONDS = 0.05


class Recover:
    """A system with one tenant, one agent and one channel."""

    def __init__(self, system: System, company: Company, vendor: TelegramStandIn, agent: str, path: str) -> None:
        self._system = system
        self._stack = Stack(system.home)
        self._company = company
        self._vendor = vendor
        self._agent = agent
        self._path = path
        self._sent = 0

    async def measure(self, progress: Callable[[int, int], None], rounds: int) -> list[Units]:
        """Raises TimeoutError if a service does not recover within WAIT_SECONDS."""
        await self.round("")
        seconds: dict[str, list[float]] = {name: [] for name in GOALS}
        for number in range(rounds):
            for name, found in seconds.items():
                found.append(await self.round(name))
            progress(number + 1, rounds)
        return [
            median_units("recover", f"SIGKILL of {name} to its next message", GOALS[name], found, "s")
            for name, found in seconds.items()
        ]

    async def round(self, killed: str) -> float:
        """Kills the service (none, if the name is empty) and sends one message all the way. The seconds that it took
        until the service had recovered."""
        self._sent += 1
        body, headers = self._vendor.update(f"message {self._sent}", chat=self._sent)
        if killed:
            await asyncio.to_thread(self._stack.kill, killed)
        began = perf_counter()
        async with self._system.client() as client:
            await until(lambda: _accepted(client, self._path, body, headers), seconds=WAIT_SECONDS)
        accepted = perf_counter() - began
        await until(self._answered, seconds=WAIT_SECONDS)
        answered = perf_counter() - began
        await until(self._charged, seconds=WAIT_SECONDS)
        charged = perf_counter() - began
        return {"channel": accepted, "agent": answered}.get(killed, charged)

    async def _answered(self) -> bool:
        return len(self._vendor.ledger) >= self._sent

    async def _charged(self) -> bool:
        runs = (await self._company.get("/api/v1/runs", agent_id=self._agent, limit=1))["items"]
        run = await self._company.get(f"/api/v1/runs/{runs[0]['id']}")
        return run["cost_nanos"] is not None


async def _accepted(client: httpx.AsyncClient, path: str, body: bytes, headers: dict[str, str]) -> bool:
    try:
        return (await client.post(path, content=body, headers=headers)).status_code == 200
    except httpx.TransportError:
        return False


@asynccontextmanager
async def on_system(system: System, models: ModelServer) -> AsyncIterator[Recover]:
    provider = {"base_url": models.url, "api_key": KEY}
    agent: dict[str, Any] = {"name": "Helper", "model": "openai/gpt-4o-mini", "provider": provider, "system_prompt": ""}
    async with TelegramStandIn() as vendor, system.company("Recover", credit_nanos=10**12) as company:
        made = await company.make("/api/v1/agents", agent)
        account = {"type": "telegram", "agent_id": made["id"], "credentials": vendor.credentials}
        channel = await company.make("/api/v1/channels", {**account, "api_base": vendor.url})
        yield Recover(system, company, vendor, made["id"], channel["webhook_path"])


@asynccontextmanager
async def running(stack: Stack) -> AsyncIterator[Recover]:
    """Starts the missing engines and all services of the stack."""
    await asyncio.to_thread(run_claw, stack.home, "up")
    async with model_server() as models, on_system(System.at(stack.home), models) as bench:
        yield bench
