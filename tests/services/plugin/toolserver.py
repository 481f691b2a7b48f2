"""A tenant's tool server that checks each request strictly and keeps a ledger of requests.

It drops repeats by ``webhook-id``, as Standard Webhooks requires of a receiver. `effects` holds the effects, `received`
all requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.observe.metrics import Metrics
from infra.web.http import Health, create_app
from infra.web.server import serve_http

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class ToolServer:
    """The server. While `hold` is clear, the tool ``slow`` does not answer."""

    def __init__(self) -> None:
        self.url = ""
        self.secret = SECRET
        self.received: list[tuple[str, dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.effects: dict[str, Any] = {}
        self.refused: list[str] = []
        self.hold = asyncio.Event()
        self.over = asyncio.Event()
        """The tests are over: calls that were never answered need not be drained."""
        self.busy = 0
        self.megabytes = 0

    def ids(self, tool: str) -> list[str]:
        return [id_ for id_, body in self.received if body["tool"] == tool]

    async def arrived(self, id_: str) -> None:
        async with asyncio.timeout(20):
            while id_ not in [known for known, _ in self.received]:
                await asyncio.sleep(0.02)

    async def handle(self, request: Request) -> Response:
        raw = await request.body()
        try:
            body: dict[str, Any] = Webhook(self.secret).verify(raw, dict(request.headers))
        except WebhookVerificationError as error:
            self.refused.append(str(error))
            return Response("forged", 401)
        assert set(body) == {"tool", "arguments", "config"}
        id_ = request.headers["webhook-id"]
        self.received.append((id_, body))
        self.headers.append(dict(request.headers))
        match body["tool"]:
            case "huge":
                return StreamingResponse(self._huge(), media_type="application/json")
            case "silent":
                await self.over.wait()
            case "slow" | "slow_once":
                await self.hold.wait()
            case "refusing":
                return Response("no such customer", 404)
            case "talkative":
                return Response("<html>")
            case "busy" if self.busy:
                self.busy -= 1
                return Response("", 503, {"retry-after": "0"})
        self.effects.setdefault(id_, body["arguments"])
        return JSONResponse({"did": self.effects[id_], "config": body["config"]})

    async def _huge(self) -> AsyncIterator[bytes]:
        yield b'"'
        for _ in range(50):
            yield b"x" * 1_000_000
            self.megabytes += 1
            # Slow enough to notice that the client has disconnected.
            await asyncio.sleep(0.05)
        yield b'"'


@asynccontextmanager
async def tool_server() -> AsyncIterator[ToolServer]:
    """Starts a server."""
    server = ToolServer()
    app = create_app(
        [Route("/tools", server.handle, methods=["POST"])], Health("tools", "1"), Metrics(CollectorRegistry())
    )
    http = await serve_http(app, 0)
    server.url = f"http://127.0.0.1:{http.port}/tools"
    try:
        yield server
    finally:
        server.hold.set()
        server.over.set()
        await http.stop()
