"""Support for endpoints that ignore ``stream: true`` and answer in one piece."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec

from infra.web.http import media_type


class Streaming(httpx2.AsyncBaseTransport):
    """Converts an answer in one piece into a stream. Other answers pass through unchanged."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        kind = media_type(response.headers)
        if response.status_code != 200 or kind != "application/json" or not request.url.path.endswith("/completions"):
            return response
        body = await response.aread()
        await response.aclose()
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, content=_events(body), request=request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def _events(body: bytes) -> bytes:
    """A ``chat.completion`` as ``chat.completion.chunk`` events. Any other body becomes one event, unchanged."""
    try:
        completion: dict[str, Any] = msgspec.json.decode(body)
        choices = [_chunk(choice) for choice in completion["choices"]]
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError):
        return b"data: " + body.replace(b"\n", b" ") + b"\n\n"
    chunk = completion | {"object": "chat.completion.chunk", "choices": choices}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"


def _chunk(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [{"index": n} | call for n, call in enumerate(message.get("tool_calls") or ())]
    return {
        "index": choice.get("index", 0),
        "delta": message | ({"tool_calls": calls} if calls else {}),
        # The answer is complete, even if it has no finish reason.
        "finish_reason": choice.get("finish_reason") or "stop",
    }
