"""An MCP server that answers with the given JSON, without the checks of the official package."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.observe.metrics import Metrics
from infra.web.http import Health, create_app
from infra.web.server import serve_http


class RawMcp:
    def __init__(self) -> None:
        self.url = ""
        self.tools: list[Any] = []
        self.results: dict[str, Any] = {}
        """Tool → result of its call."""
        self.said: dict[str, Any] = {}
        """Method → result in place of the right one."""
        self.endless = False
        """After each page of tools there is another one."""
        self.methods: list[str] = []
        self.restarts = 0
        """How many calls still come just after a restart, which has lost the session."""
        self.lost: tuple[int, int, str] = (404, -32600, "Session not found")
        """Status, code and message of these answers."""
        self.answers: list[Response] = []
        """Of the next calls."""
        self.refuses = 0
        """Status of all answers, if it is not 0."""
        self.type: str | None = None
        """Content type of the results; empty: they name none. None: the right one."""
        self.as_events = False
        """The results are streams of one event."""
        self._session = 0

    async def handle(self, request: Request) -> Response:
        message = json.loads(await request.body())
        self.methods.append(message["method"])
        match message["method"]:
            case _ if self.refuses:
                return JSONResponse({"error": "invalid_token"}, self.refuses, {"www-authenticate": "Bearer"})
            case method if method in self.said:
                result: Any = self.said[method]
            case "initialize":
                self._session += 1
                result = {
                    "protocolVersion": message["params"]["protocolVersion"],
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "raw", "version": "1"},
                }
            case "tools/list":
                result = {"tools": self.tools} | ({"nextCursor": "more"} if self.endless else {})
            case "tools/call" if self.restarts:
                self.restarts -= 1
                status, code, text = self.lost
                error = {"code": code, "message": text}
                return JSONResponse({"jsonrpc": "2.0", "id": None, "error": error}, status)
            case "tools/call" if self.answers:
                return self.answers.pop(0)
            case "tools/call":
                result = self.results[message["params"]["name"]]
            case _ if "id" not in message:
                return Response(status_code=202)
            case method:
                error = {"code": -32601, "message": f"unknown method {method}"}
                return JSONResponse({"jsonrpc": "2.0", "id": message["id"], "error": error})
        answer = {"jsonrpc": "2.0", "id": message["id"], "result": result}
        written = json.dumps(answer)
        type_ = self.type
        if self.as_events:
            written = f"event: message\ndata: {written}\n\n"
            type_ = "text/event-stream" if type_ is None else type_
        headers = {"mcp-session-id": f"s{self._session}"}
        if type_ != "":
            headers["content-type"] = "application/json" if type_ is None else type_
        return Response(written, headers=headers)


@asynccontextmanager
async def raw_mcp_server() -> AsyncIterator[RawMcp]:
    """Starts a server."""
    server = RawMcp()
    app = create_app([Route("/mcp", server.handle, methods=["POST"])], Health("mcp", "1"), Metrics(CollectorRegistry()))
    http = await serve_http(app, 0)
    server.url = f"http://127.0.0.1:{http.port}/mcp"
    yield server
    await http.stop()
