"""The whole system as `./claw up` starts it, used only through its gateway, as an outside client would."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

from tooling.testing.model_server import ModelServer, model_server
from tooling.testing.stack import private_home, run_claw

T = TypeVar("T")


@dataclass
class System:
    """A running system: its state folder, the URL of its gateway and the operator's token."""

    home: Path
    base_url: str
    admin_token: str

    def client(self, key: str = "") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.base_url, headers=headers, trust_env=False, timeout=30)

    async def tenant(self, name: str, **more: Any) -> str:
        """Makes a tenant and returns its API key."""
        async with self.client(self.admin_token) as operator:
            answer = await operator.post("/api/v1/tenants", json={"name": name, **more})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["api_key"])


@pytest.fixture(scope="package")
def system() -> Iterator[System]:
    """All engines and services on free ports with their own state, removed afterwards."""
    with private_home() as home:
        run_claw(home, "up")
        credentials = json.loads((home / "credentials.json").read_text())
        yield System(home, credentials["base_url"], credentials["admin_token"])


@pytest.fixture(scope="module")
async def models() -> AsyncIterator[ModelServer]:
    async with model_server() as server:
        yield server


async def until(ask: Callable[[], Awaitable[T | None]], *, seconds: float = 60) -> T:
    """Calls `ask` until its answer is true and returns it. Raises TimeoutError with the last answer."""
    deadline = time.monotonic() + seconds
    while not (answer := await ask()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"still {answer!r} after {seconds} s")
        await asyncio.sleep(0.05)
    return answer
