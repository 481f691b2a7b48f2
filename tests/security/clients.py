"""Calls to operations as any kind of client, with a good body for each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

import httpx

from tests.security.pages import Operation
from tooling.testing.platform import Platform

# Bodies that the code accepts, for pages without such an example.
BODIES: Mapping[str, Any] = {
    "PATCH /api/v1/members/{id}": {"role": "viewer"},
    "PUT /api/v1/documents/{document_id}": {"url": "http://127.0.0.1:9/"},
    "POST /api/v1/agents/{agent_id}/sessions/{key}/messages": {"text": "Hello"},
    "POST /internal/agents/{agent_id}/completions": {"text": "Hello"},
}
# Route → why it does not answer 404 for the id of another tenant's thing.
OWN_NAMES = {
    "POST /api/v1/subjects/{id}/erase": "the ids of persons belong to each tenant; an unknown one is erased in advance",
    "GET /api/v1/traces/{trace_id}": "a trace has parts of several tenants, and each sees its own part",
}


class Clients:
    """Requests to each service, a few at a time."""

    def __init__(self, system: Platform, http: Mapping[str, httpx.AsyncClient]) -> None:
        self._system = system
        self._http = http
        self._few = asyncio.Semaphore(8)

    async def call(
        self, op: Operation, path: str, who: tuple[str, tuple[str, ...]] | None, body: Any = None, **params: str
    ) -> httpx.Response:
        """who: the tenant and the scopes; None: a request without an identity."""
        headers = self._system.headers(who[0], scopes=who[1], actor=f"api_key:{uuid4()}") if who else {}
        async with self._few:
            json = {} if body is None and op.body is not None else body
            return await self._http[op.service].request(op.method, path, headers=headers, json=json, params=params)


def leaks(text: str, *secrets: str) -> bool:
    return any(secret.casefold() in text.casefold() for secret in secrets)
