"""Built-in tools and tools of a real MCP server, called through the real process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from infra.errors import InvalidMessage, NotFound
from infra.observe.metrics import Metrics
from infra.web import rpc
from infra.web.http import Health, create_app
from infra.web.server import serve_http
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from services.plugin.domain import ToolRequest
from services.plugin.tools import builtin, pages
from services.plugin.tools.builtin import Backends
from services.plugin.tools.pages import MAX_READERS
from tests.services.plugin.conftest import CallReply, call
from tooling.testing import keys
from tooling.testing.platform import Platform
from tooling.testing.stack import free_port

PAGE = """<html><head><title>Lamp &amp; Co</title><script>track()</script></head>
<body><style>p {}</style><h1>Lamps</h1><p>From <b>9 €</b></p></body></html>"""


class Memory(memory_pb2_grpc.MemoryServicer):
    """A stand-in for memory. Its passage repeats the request."""

    async def Retrieve(self, request: Any, context: Any) -> memory_pb2.RetrieveReply:
        source = memory_pb2.Source(document_id="d1", name="handbook.md", section="Returns")
        text = f"{rpc.tenant()} asked for {request.query}, {request.limit}{request.agent_id}"
        return memory_pb2.RetrieveReply(passages=[memory_pb2.Passage(text=text, score=0.75, source=source)])


@pytest.fixture(scope="module")
async def memory(platform: Platform) -> AsyncIterator[None]:
    server = rpc.Server("memory", keys.callers("memory"), Metrics(CollectorRegistry()))
    memory_pb2_grpc.add_MemoryServicer_to_server(Memory(), server.grpc)  # type: ignore[abstract]
    await server.start(platform.ports["memory_grpc"])
    yield
    await server.stop()


@pytest.fixture(scope="module")
async def web() -> AsyncIterator[str]:
    """Starts a web site. Returns its base URL."""

    async def page(request: Request) -> Response:
        match request.path_params["page"]:
            case "html":
                return Response(PAGE.encode("utf-16"), media_type="text/html; charset=utf-16")
            case "long":
                return PlainTextResponse("x" * 100_000)
            case "image":
                return Response(b"\x89PNG", media_type="image/png")
            case "moved":
                return Response(status_code=302, headers={"location": "http://169.254.169.254/"})
            case _:
                return Response(status_code=404)

    app = create_app([Route("/{page}", page)], Health("web", "1"), Metrics(CollectorRegistry()))
    server = await serve_http(app, 0)
    yield f"http://127.0.0.1:{server.port}"
    await server.stop()


class Office:
    """The MCP server."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._port}/mcp"

    async def start(self, *more: str) -> None:
        self.stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.plugin.mcp_server", str(self._port), *more]
        )

        async def answers() -> bool:
            try:
                async with httpx.AsyncClient() as client:
                    return (await client.post(self.url)).status_code > 0
            except httpx.TransportError:
                return False

        await self._platform.until(answers)

    def stop(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()


@pytest.fixture
async def office(platform: Platform) -> AsyncIterator[Office]:
    office = Office(platform)
    await office.start()
    yield office
    office.stop()


async def result(platform: Platform, tool: str, arguments: dict[str, Any], *, tenant: str = "acme") -> Any:
    reply = await call(platform, tenant, tool, json.dumps(arguments), key=f"{tool}-{hash(str(arguments))}")
    assert reply.outcome == CallReply.OUTCOME_SUCCEEDED, reply.error
    return json.loads(reply.result_json)


async def failure(platform: Platform, tool: str, arguments: dict[str, Any]) -> str:
    reply = await call(platform, "acme", tool, json.dumps(arguments), key=f"{tool}-{hash(str(arguments))}")
    assert reply.outcome == CallReply.OUTCOME_FAILED
    return reply.error


async def test_every_tenant_has_the_built_in_tools(plugin: Platform, memory: None) -> None:
    assert await result(plugin, "calculator", {"expression": "0.1 + 0.2"}) == {"result": "0.3", "exact": True}
    assert "division by zero" in await failure(plugin, "calculator", {"expression": "1/0"})
    now = await result(plugin, "time", {"timezone": "Asia/Kolkata"})
    assert now["iso"].endswith("+05:30")
    assert "IANA" in await failure(plugin, "time", {"timezone": "../etc/passwd"})
    found = await result(plugin, "knowledge_search", {"query": "returns", "limit": 3})
    assert found["passages"] == [
        {
            "text": "acme asked for returns, 3",
            "score": 0.75,
            "source": {"document_id": "d1", "name": "handbook.md", "section": "Returns", "page": None},
        }
    ]


async def test_a_page_is_read_as_its_text(plugin: Platform, web: str) -> None:
    page = await result(plugin, "http_fetch", {"url": f"{web}/html"})
    assert (page["title"], page["text"]) == ("Lamp & Co", "Lamps\nFrom\n9 €")
    assert page["truncated"] is False
    assert (await result(plugin, "http_fetch", {"url": f"{web}/long"}))["truncated"] is True
    assert await failure(plugin, "http_fetch", {"url": f"{web}/image"}) == "image/png: only text can be read"
    assert await failure(plugin, "http_fetch", {"url": f"{web}/none"}) == "HTTP 404"
    # The model is told the new address. The tool does not follow it.
    assert "HTTP 302" in await failure(plugin, "http_fetch", {"url": f"{web}/moved"})


async def test_tools_of_an_mcp_server_are_found_offered_and_called(plugin: Platform, office: Office) -> None:
    async with plugin.client("plugin", "acme") as client:
        answer = await client.post("/api/v1/plugins", json={"name": "office", "kind": "mcp", "url": office.url})
        assert answer.status_code == 201, answer.text
        offered = (await client.get("/api/v1/tools")).json()["items"]
    assert answer.json()["left_out"] == []
    # Names are converted. A taken name gets the plugin's name as a prefix. Only a tool with a hint is repeatable.
    assert {tool["name"]: tool["effect"] for tool in offered if tool["plugin"] == "office"} == {
        "room": "repeatable",
        "send_mail": "once",
        "office_time": "once",
    }
    assert await result(plugin, "room", {"floor": 3}) == {"room": "A301"}
    with pytest.raises(InvalidMessage) as refused:
        await call(plugin, "acme", "room", '{"floor": "third"}', key="bad-floor")
    assert refused.value.field == "arguments.floor"
    sent = await call(plugin, "acme", "send_mail", '{"to": "ann"}', key="mail-1")
    assert json.loads(sent.result_json) == {"result": "sent to ann as mail-1"}
    assert "Error executing tool" in await failure(plugin, "send_mail", {"to": "nobody"})
    assert "too large" in await failure(plugin, "send_mail", {"to": "everybody"})
    never = await call(plugin, "acme", "send_mail", '{"to": "never"}', key="mail-never", timeout=3)
    assert never.outcome == CallReply.OUTCOME_UNKNOWN


async def test_a_refresh_finds_new_tools_and_leaves_names_as_they_are(plugin: Platform, office: Office) -> None:
    async with plugin.client("plugin", "growing") as client:
        made = (await client.post("/api/v1/plugins", json={"name": "office", "kind": "mcp", "url": office.url})).json()
        await office.start("ROOM")
        answer = await client.post(f"/api/v1/plugins/{made['id']}/refresh")
        assert answer.status_code == 200, answer.text
        shown = (await client.get(f"/api/v1/plugins/{made['id']}")).json()
        office.stop()
        assert (await client.post(f"/api/v1/plugins/{made['id']}/refresh")).status_code == 503
    assert answer.json() == shown
    # `room` was known before `ROOM`, so it keeps its name.
    assert [tool["name"] for tool in shown["tools"]] == ["office_room", "office_time", "room", "send_mail"]
    away = await call(plugin, "growing", "room", '{"floor": 1}', key="away")
    assert away.outcome == CallReply.OUTCOME_FAILED
    assert "cannot be reached" in away.error
    await office.start("ROOM")
    assert await result(plugin, "office_room", {}, tenant="growing") == {"result": "late"}
    assert await result(plugin, "room", {"floor": 2}, tenant="growing") == {"room": "A201"}


async def test_a_disabled_tool_is_neither_listed_nor_called(plugin: Platform) -> None:
    stub = plugin_pb2_grpc.PluginStub(plugin.channels("agent").to(plugin.grpc("plugin"), "plugin"))

    async def names() -> list[str]:
        request = plugin_pb2.ToolsRequest(names=["time", "calculator", "nothing"])
        reply = await stub.Tools(request, metadata=rpc.tenant_metadata("frugal"))
        return [tool.name for tool in reply.tools]

    assert await names() == ["calculator", "time"]
    async with plugin.client("plugin", "frugal") as client:
        assert (await client.patch("/api/v1/plugins/time", json={"enabled": False})).json()["enabled"] is False
        assert await names() == ["calculator"]
        with pytest.raises(NotFound):
            await call(plugin, "frugal", "time", key="off")
        await client.patch("/api/v1/plugins/time", json={"enabled": True})
    assert await names() == ["calculator", "time"]


async def test_fetching_many_pages_does_not_keep_others_waiting(plugin: Platform, web: str) -> None:
    pages = [result(plugin, "http_fetch", {"url": f"{web}/long?{n}"}) for n in range(20)]
    sums = [result(plugin, "calculator", {"expression": f"{n} + 1"}) for n in range(20)]
    answers = await asyncio.gather(*pages, *sums)
    assert [answer["result"] for answer in answers[20:]] == [str(n + 1) for n in range(20)]


async def test_pages_are_read_in_turns_by_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Web:
        async def request(self, _: str, url: str, **__: Any) -> Any:
            return SimpleNamespace(status=200, headers={"content-type": "text/html"}, body=url.encode())

    async def slow(_: str, body: bytes, *__: Any) -> tuple[str, str]:
        read.append(body.decode())
        await asyncio.sleep(0)
        return "", ""

    monkeypatch.setattr(pages, "read", slow)
    backends = Backends(cast(Any, Web()), cast(Any, None))
    await asyncio.gather(
        *(
            builtin.http_fetch(ToolRequest(tenant, "http_fetch", {"url": tenant}, "key", 60.0), backends)
            for tenant in [*["many"] * 20, "one"]
        )
    )
    assert len(read) == 21
    assert read.index("one") <= MAX_READERS
