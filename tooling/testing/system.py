"""A running system as an outside client sees it: its gateway, its operator's token, and its processes to be killed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass
class System:
    """A system that `./claw up` has started, in its state folder `home`."""

    home: Path
    base_url: str
    admin_token: str

    @classmethod
    def at(cls, home: Path) -> System:
        """Reads the access from the state folder."""
        credentials = json.loads((home / "credentials.json").read_text())
        return cls(home, credentials["base_url"], credentials["admin_token"])

    def client(self, key: str = "") -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.base_url, headers=headers, trust_env=False, timeout=30)

    async def tenant(self, name: str, **more: Any) -> str:
        """Makes a tenant and returns its API key."""
        return str((await self._tenant(name, more))["api_key"])

    async def _tenant(self, name: str, more: dict[str, Any]) -> dict[str, Any]:
        async with self.client(self.admin_token) as operator:
            answer = await operator.post("/api/v1/tenants", json={"name": name, **more})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    @asynccontextmanager
    async def company(self, name: str, **more: Any) -> AsyncIterator[Company]:
        """A new tenant with a client of its key."""
        made = await self._tenant(name, more)
        async with self.client(made["api_key"]) as api:
            yield Company(api, made["id"])

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Company]:
        """A client with the operator's token."""
        async with self.client(self.admin_token) as api:
            yield Company(api)


@dataclass
class Company:
    """A tenant, with a client that has its API key."""

    api: httpx.AsyncClient
    id: str = ""
    """Of the tenant."""

    async def make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.api.post(path, json=body)
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    async def get(self, path: str, **params: Any) -> dict[str, Any]:
        answer = await self.api.get(path, params=params)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def all(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """All pages of a list."""
        items: list[dict[str, Any]] = []
        while True:
            page = await self.get(path, limit=100, **params)
            items += page["items"]
            if not page["next"]:
                return items
            params["cursor"] = page["next"]
