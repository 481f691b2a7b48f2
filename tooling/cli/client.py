"""A client of the gateway for the commands: JSON calls and event streams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from infra.errors import describe
from tooling.stack.engines.base import EngineError
from tooling.stack.operator import remedy

TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Event:
    """One event of a stream."""

    name: str
    id: str
    """Empty if the event has no id."""
    data: dict[str, Any]


class Gateway:
    """A client with one key. Raises EngineError with the call and the gateway's answer if the call fails."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def get(self, path: str, **params: Any) -> Any:
        return await self.call("GET", path, params=params)

    async def post(self, path: str, body: dict[str, Any] | None = None, **more: Any) -> Any:
        return await self.call("POST", path, json=body, **more)

    async def call(self, method: str, path: str, **more: Any) -> Any:
        try:
            answer = await self._client.request(method, path, **more)
        except httpx.HTTPError as error:
            reason = f"the gateway does not answer {method} {path} ({describe(error)})"
            raise EngineError(f"{reason}. {remedy()}") from error
        _check(answer, f"{method} {path}")
        return answer.json() if answer.content else None

    async def events(self, method: str, path: str, **more: Any) -> AsyncIterator[Event]:
        """The events of a stream (text/event-stream, WHATWG HTML §9.2) until its end."""
        headers = {"accept": "text/event-stream"}
        async with self._client.stream(method, path, headers=headers, timeout=None, **more) as answer:
            if answer.status_code >= 400:
                await answer.aread()
            _check(answer, f"{method} {path}")
            name, id_, data = "message", "", ""
            async for line in answer.aiter_lines():
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "event":
                    name = value
                elif field == "id":
                    id_ = value
                elif field == "data":
                    data += value
                elif not line and data:
                    yield Event(name, id_, json.loads(data))
                    name, id_, data = "message", "", ""


@asynccontextmanager
async def gateway(base_url: str, key: str, *, tenant_id: str = "") -> AsyncIterator[Gateway]:
    """`key`: an API key, or the operator's token. With the token, `tenant_id` names the tenant to act for."""
    headers = {"authorization": f"Bearer {key}", **({"x-claw-tenant": tenant_id} if tenant_id else {})}
    timeout = httpx.Timeout(TIMEOUT_SECONDS)
    async with httpx.AsyncClient(base_url=base_url, headers=headers, trust_env=False, timeout=timeout) as client:
        yield Gateway(client)


def _check(answer: httpx.Response, call: str) -> None:
    if answer.status_code < 400:
        return
    try:
        problem = answer.json()
        fields = [f"{error['field']}: {error['message']}" for error in problem.get("errors", ())]
        # The detail of an error of one field is that error.
        reason = "\n  ".join(dict.fromkeys([problem["detail"], *fields]))
    except (ValueError, KeyError):
        reason = answer.text[:500]
    raise EngineError(f"{call} was answered {answer.status_code}: {reason}")
