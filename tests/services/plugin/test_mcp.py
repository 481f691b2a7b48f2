"""MCP servers as they are: tools with older or malformed schemas, and results with pictures."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from typing import Any

import mcp_types
import pytest
from starlette.responses import JSONResponse, Response

from infra.errors import EffectFailed, InvalidMessage, TooLarge, Transient
from infra.outgoing.client import Outgoing
from services.plugin.domain import MAX_FILES_BYTES
from services.plugin.files import ResultFiles
from services.plugin.tools import mcp
from tests.services.plugin.conftest import CallReply, call
from tests.services.plugin.raw_mcp import RawMcp, raw_mcp_server
from tooling.testing.platform import Platform

BIG = {"type": "object", "description": "x" * 40_000}


@pytest.fixture
async def raw() -> AsyncIterator[RawMcp]:
    async with raw_mcp_server() as server:
        yield server


async def register(plugin: Platform, tenant: str, server: RawMcp) -> dict[str, Any]:
    async with plugin.client("plugin", tenant) as client:
        answer = await client.post("/api/v1/plugins", json={"name": "raw", "kind": "mcp", "url": server.url})
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_tools_of_older_drafts_are_adapted_and_malformed_ones_left_out_by_name(
    plugin: Platform, raw: RawMcp
) -> None:
    pair = {"type": "array", "items": [{"type": "string"}, {"type": "integer"}]}
    raw.tools = [
        {"name": "tuple", "inputSchema": {"type": "object", "properties": {"pair": pair}}},
        {"name": "limit", "inputSchema": {"properties": {"n": {"minimum": 0, "exclusiveMinimum": True}}}},
        {"name": "named", "inputSchema": {"type": "object", "patternProperties": {"^x": {}}}},
        {"name": "letters", "inputSchema": {"type": "object", "properties": {"a": {"pattern": "^\\p{L}+$"}}}},
        {
            "name": "refers",
            "inputSchema": {
                "type": "object",
                "properties": {"a": {"$ref": "#/definitions/a"}},
                "definitions": {"a": {"type": "string"}},
            },
        },
        {"name": "untyped", "inputSchema": {}},
        {"name": "without"},
        {"name": "big", "inputSchema": BIG},
        {"name": "wrong", "inputSchema": {"type": "object", "properties": {"a": {"type": "strin"}}}},
        {"name": "text", "inputSchema": {"type": "string"}},
        {"name": 7, "inputSchema": {"type": "object"}},
        "not a tool",
    ]
    made = await register(plugin, "older", raw)
    schemas = {tool["name"]: tool["schema"] for tool in made["tools"]}
    assert set(schemas) == {"tuple", "limit", "named", "letters", "refers", "untyped", "without"}
    assert schemas["tuple"]["properties"]["pair"]["prefixItems"] == pair["items"]
    assert schemas["limit"] == {"type": "object", "properties": {"n": {"exclusiveMinimum": 0}}}
    assert schemas["untyped"] == schemas["without"] == schemas["named"] == {"type": "object"}
    assert sorted((gone["name"], gone["reason"].partition(":")[0]) for gone in made["left_out"]) == [
        ("", "name"),
        ("", "name"),
        ("big", "schema"),
        ("text", "schema.type"),
        ("wrong", "schema.properties.a.type"),
    ]
    raw.results["limit"] = {"content": [{"type": "text", "text": "done"}]}
    reply = await call(plugin, "older", "limit", '{"n": 1}', key="limit-1")
    assert (reply.outcome, json.loads(reply.result_json)) == (CallReply.OUTCOME_SUCCEEDED, "done")
    assert raw.methods[-1] == "tools/call", "the tools are not listed again after each call"
    for tool, arguments, field in (
        ("limit", '{"n": 0}', "arguments.n"),
        ("tuple", '{"pair": ["a", "b"]}', "arguments.pair[1]"),
        ("letters", '{"a": "1"}', "arguments.a"),
    ):
        with pytest.raises(InvalidMessage) as refused:
            await call(plugin, "older", tool, arguments, key="bad")
        assert refused.value.field == field


@pytest.mark.parametrize("size", [100_000, 3_000_000, 4_000_000])
async def test_pictures_are_files_beside_the_result_with_a_note_in_it_and_large_ones_are_left_out(
    plugin: Platform, raw: RawMcp, size: int
) -> None:
    data = base64.b64encode(os.urandom(size)).decode()
    raw.tools = [{"name": "draw", "inputSchema": {"type": "object"}}]
    await register(plugin, f"painter-{size}", raw)
    text = {"type": "text", "text": "Sales rose."}
    picture = {"type": "image", "data": data, "mimeType": "image/png"}
    resource = {"uri": "file:///a.bin", "mimeType": "application/pdf", "blob": data[:1000]}
    raw.results["draw"] = {"content": [text, picture, {"type": "resource", "resource": resource}]}
    reply = await call(plugin, f"painter-{size}", "draw", key=f"blocks-{size}")
    assert reply.outcome == CallReply.OUTCOME_SUCCEEDED, reply.error
    words, image, paper = json.loads(reply.result_json).splitlines()
    left_out = size > MAX_FILES_BYTES
    files = [os.path.splitext(file.name) for file in reply.files]
    assert words == "Sales rose."
    if left_out:
        assert image == f"[image left out: image/png, {len(data) * 3 // 4} bytes]"
        assert files == [("a.bin-1", ".pdf")]
    else:
        assert image == f"[file image-1.png: image/png, {size} bytes]"
        assert files == [("image-1", ".png"), ("a.bin-2", ".pdf")]
        assert reply.files[0].content == base64.b64decode(data)
        assert await call(plugin, f"painter-{size}", "draw", key=f"blocks-{size}") == reply
    assert paper.startswith("[file a.bin-")
    # The whole answer may have 8 MB.
    structured = {"text": "Sales rose.", "picture": data[:100_000]}
    raw.results["draw"] = {"content": [text, picture], "structuredContent": structured}
    reply = await call(plugin, f"painter-{size}", "draw", key=f"structured-{size}")
    result = json.loads(reply.result_json)
    assert result["result"]["text"] == "Sales rose."
    assert "base64 data left out" in result["result"]["picture"]
    assert ("image left out" if left_out else "[file image-1.png") in result["more"][0]
    assert len(reply.result_json) < 1_000


@pytest.mark.parametrize("as_events", [False, True])
@pytest.mark.parametrize("type_", ["", "text/plain; charset=utf-8", "application/octet-stream", "application/json"])
async def test_a_message_with_another_content_type_or_none_is_read(
    plugin: Platform, raw: RawMcp, type_: str, as_events: bool
) -> None:
    raw.type, raw.as_events = type_, as_events
    raw.tools = [{"name": "look", "inputSchema": {"type": "object"}}]
    raw.results["look"] = {"content": [{"type": "text", "text": "seen"}]}
    tenant = f"typed-{as_events}{type_[-4:]}"
    await register(plugin, tenant, raw)
    reply = await call(plugin, tenant, "look", key=f"{tenant}-1")
    assert (reply.outcome, reply.result_json) == (CallReply.OUTCOME_SUCCEEDED, '"seen"')
    raw.answers = [Response('{"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "no money"}}', 400)]
    reply = await call(plugin, tenant, "look", key=f"{tenant}-2")
    assert (reply.outcome, reply.error) == (CallReply.OUTCOME_FAILED, "no money (HTTP 400)")
    raw.answers = [Response("<html>Sign in</html>", media_type="text/html")]
    reply = await call(plugin, tenant, "look", key=f"{tenant}-3")
    assert (reply.outcome, "Unexpected content type: text/html" in reply.error) == (CallReply.OUTCOME_FAILED, True)


@pytest.mark.parametrize("hints", [{"readOnlyHint": True}, {}])
@pytest.mark.parametrize(
    "lost",
    [
        (404, -32600, "Session not found"),
        # The official TypeScript package, and its examples. The Python package has these codes for no answer.
        (404, -32001, "Session not found"),
        (400, -32000, "Bad Request: No valid session ID provided"),
    ],
    ids=str,
)
async def test_a_call_whose_session_the_server_has_lost_is_made_in_a_new_one(
    plugin: Platform, raw: RawMcp, lost: tuple[int, int, str], hints: dict[str, bool]
) -> None:
    raw.lost = lost
    raw.tools = [{"name": "look", "inputSchema": {"type": "object"}, "annotations": hints}]
    raw.results["look"] = {"content": [{"type": "text", "text": "seen"}]}
    tenant = f"restarts-{len(hints)}{lost[1]}"
    await register(plugin, tenant, raw)
    raw.methods.clear()
    raw.restarts = 1
    reply = await call(plugin, tenant, "look", key=f"{tenant}-1")
    assert (reply.outcome, reply.result_json) == (CallReply.OUTCOME_SUCCEEDED, '"seen"')
    assert [raw.methods.count(name) for name in ("initialize", "tools/call")] == [2, 2]
    raw.restarts = 100
    reply = await call(plugin, tenant, "look", key=f"{tenant}-2")
    assert (reply.outcome, f"HTTP {lost[0]}" in reply.error) == (CallReply.OUTCOME_FAILED, True)


async def test_an_error_of_a_server_is_told_apart_from_no_answer(plugin: Platform, raw: RawMcp) -> None:
    raw.tools = [{"name": "pay", "inputSchema": {"type": "object"}}]
    raw.results["pay"] = {"content": [{"type": "text", "text": "paid"}]}
    await register(plugin, "payer", raw)
    for code in (-32000, -32001):
        raw.answers = [JSONResponse({"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": "no money"}}, 400)]
        reply = await call(plugin, "payer", "pay", key=f"pay{code}")
        assert (reply.outcome, reply.error) == (CallReply.OUTCOME_FAILED, "no money (HTTP 400)")
    for status in (429, 503):
        raw.answers = [Response(status_code=status, headers={"retry-after": "0.5"})]
        reply = await call(plugin, "payer", "pay", key=f"pay-{status}")
        assert (reply.outcome, reply.result_json) == (CallReply.OUTCOME_SUCCEEDED, '"paid"')
    for event in ("", "id: 1\nretry: 1\ndata:\n\n"):
        # The stream ends without an answer.
        raw.answers = [Response(event, media_type="text/event-stream")]
        reply = await call(plugin, "payer", "pay", key=f"pay-cut-{len(event)}")
        assert reply.outcome == CallReply.OUTCOME_UNKNOWN, reply.error
    for status in (502, 504):
        # They come from a gateway. The tool behind it may have done its work.
        raw.answers = [Response("<html>", status_code=status)]
        reply = await call(plugin, "payer", "pay", key=f"pay-{status}")
        assert reply.outcome == CallReply.OUTCOME_UNKNOWN


@pytest.mark.parametrize(
    ("structured", "texts", "expected"),
    [
        ({"a": 1}, ['{\n "a": 1\n}'], {"a": 1}),
        ({"result": [1, {"b": 2}]}, ["1", '{"b": 2}'], {"result": [1, {"b": 2}]}),
        ({"result": "Sunny"}, ["Sunny"], {"result": "Sunny"}),
        ([1, {"b": 2}], ['[1,{"b":2}]', "1", '{"b": 2}'], [1, {"b": 2}]),
        ("Sunny", ["Sunny"], "Sunny"),
        ({"a": 1}, [" ", ""], {"a": 1}),
        ({"a": 1}, ['{"a":1}', "Tell the person that it is late."], "Tell the person that it is late."),
        ({}, ["The only words"], "The only words"),
    ],
)
async def test_words_beside_structured_content_reach_the_model(
    structured: Any, texts: list[str], expected: Any
) -> None:
    blocks = [{"type": "text", "text": text} for text in texts]
    result = mcp_types.CallToolResult.model_validate({"content": blocks, "structuredContent": structured})
    if isinstance(expected, str) and expected != structured:
        expected = {"result": structured, "more": [expected]}
    assert mcp.result_value(result, ResultFiles()) == expected


async def test_the_readable_parts_of_a_result_are_kept(plugin: Platform, raw: RawMcp) -> None:
    raw.tools = [{"name": "show", "inputSchema": {"type": "object"}}]
    await register(plugin, "shower", raw)
    text = {"type": "text", "text": "Sunny."}
    for n, (result, expected) in enumerate(
        (
            ({"structuredContent": {"a": 1}}, {"a": 1}),
            ({"content": None, "structuredContent": {"a": 1}}, {"a": 1}),
            ({"content": [text, {"type": "video", "data": "x"}, 7]}, "Sunny.\n[video left out]\n[block left out]"),
            ({"content": [{"type": "image", "data": "AAAA"}, text]}, "[image left out]\nSunny."),
            ({"content": []}, ""),
        )
    ):
        raw.results["show"] = result
        reply = await call(plugin, "shower", "show", key=f"show-{n}")
        assert (reply.error, json.loads(reply.result_json)) == ("", expected)
    raw.results["show"] = {"task": {"taskId": "1"}}
    reply = await call(plugin, "shower", "show", key="show-none")
    assert (reply.outcome, reply.error[-14:]) == (CallReply.OUTCOME_FAILED, "has no content")


async def test_the_structured_content_of_a_failed_call_is_its_reason() -> None:
    failed = {"content": [], "structuredContent": {"error": "no such city"}, "isError": True}
    with pytest.raises(EffectFailed, match="no such city"):
        mcp.result_value(mcp_types.CallToolResult.model_validate(failed), ResultFiles())


async def test_an_answer_that_does_not_follow_the_protocol_is_a_failure_with_a_reason(
    plugin: Platform, raw: RawMcp
) -> None:
    raw.tools = [{"name": "odd", "inputSchema": {"type": "object"}}]
    await register(plugin, "odd", raw)
    raw.results["odd"] = {"content": "text"}
    reply = await call(plugin, "odd", "odd", key="odd")
    assert reply.outcome == CallReply.OUTCOME_FAILED
    assert "does not follow the protocol: " in reply.error


@pytest.mark.parametrize(
    ("tools", "error", "reason"),
    [
        ([], Transient, "did not list its tools within 1 s"),
        ([{"name": "a", "description": "x" * 1_000_000}], InvalidMessage, "lists more than 8388608 bytes"),
        ([{"name": "a", "description": "x" * 9_000_000}], TooLarge, "8388608"),
        # Of 2 MB: a result of such blocks took half a gigabyte.
        ([{"name": "a", "inputSchema": {}}] * 60_000, TooLarge, "objects and lists"),
    ],
    ids=["empty pages", "large pages", "a page beyond the limit", "very many objects"],
)
async def test_a_server_that_lists_without_end_is_left(
    raw: RawMcp, monkeypatch: pytest.MonkeyPatch, tools: list[Any], error: type[Exception], reason: str
) -> None:
    raw.tools, raw.endless = tools, True
    outgoing = Outgoing(allow_private=True)
    if not tools:
        monkeypatch.setattr(mcp, "DISCOVERY_SECONDS", 1.0)
    async with asyncio.timeout(60):
        with pytest.raises(error, match=reason):
            await mcp.discover(outgoing, raw.url, {})
    await outgoing.close()


SERVER = {"name": "raw", "version": "1"}


@pytest.mark.parametrize(
    "said",
    [
        None,
        5,
        [],
        {},
        {"protocolVersion": 5, "capabilities": {}, "serverInfo": SERVER},
        {"protocolVersion": "9999-99-99", "capabilities": {}, "serverInfo": SERVER},
        {"protocolVersion": "2025-06-18\r\nx: y", "capabilities": {}, "serverInfo": SERVER},
        {"protocolVersion": "2025-06-18", "capabilities": 5, "serverInfo": SERVER},
        {"protocolVersion": "2025-06-18", "capabilities": {}, "serverInfo": 5},
    ],
    ids=str,
)
async def test_a_handshake_that_is_none_is_refused_with_the_field(raw: RawMcp, said: Any) -> None:
    raw.said["initialize"] = said
    outgoing = Outgoing(allow_private=True)
    async with asyncio.timeout(10):
        with pytest.raises(InvalidMessage, match="MCP server") as caught:
            await mcp.discover(outgoing, raw.url, {})
    assert caught.value.field == "url"
    await outgoing.close()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_server_that_refuses_access_is_told_apart_from_none(raw: RawMcp, status: int) -> None:
    raw.refuses = status
    outgoing = Outgoing(allow_private=True)
    with pytest.raises(InvalidMessage, match=rf"refuses access \(HTTP {status}\)") as caught:
        await mcp.discover(outgoing, raw.url, {})
    assert caught.value.field == "headers"
    await outgoing.close()


async def test_an_empty_cursor_is_the_end_of_the_list(raw: RawMcp) -> None:
    raw.said["tools/list"] = {"tools": [{"name": "a", "inputSchema": {}}], "nextCursor": ""}
    outgoing = Outgoing(allow_private=True)
    assert [tool.name for tool in await mcp.discover(outgoing, raw.url, {})] == ["a"]
    await outgoing.close()
