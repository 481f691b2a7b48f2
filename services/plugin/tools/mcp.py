"""Tools of MCP servers (https://modelcontextprotocol.io), over the transport "Streamable HTTP"."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import mcp_types
import msgspec
from mcp import Client, ClientSession, MCPError
from mcp.client.streamable_http import streamable_http_client
from pydantic import ValidationError

from infra import VERSION
from infra.errors import EffectFailed, InvalidMessage, TooLarge, Transient, Unanswered
from infra.outgoing.client import Outgoing
from services.plugin.domain import McpTool, ToolRequest
from services.plugin.files import ResultFiles

# A picture of some megabytes is left out of the result, and the text beside it is kept.
MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_TOOLS = 200
DISCOVERY_SECONDS = 15.0
# A result that is passed on has fewer.
MAX_PARTS = 30_000

# In the request's ``_meta``, for servers that drop repeats. The protocol itself has no field for an idempotency key.
KEY_META = "clawbus/idempotency-key"

# The library logs session ids, and at level DEBUG the contents of messages.
logging.getLogger("mcp").setLevel(logging.WARNING)


async def discover(outgoing: Outgoing, url: str, headers: Mapping[str, str]) -> list[McpTool]:
    """Returns the tools that the server at `url` offers, at most 200.

    Raises InvalidMessage (field ``url``) if it is too large or not of an MCP server, Transient if there is none.
    """
    tools: list[McpTool] = []
    try:
        async with _connected(outgoing, url, headers, DISCOVERY_SECONDS) as (client, _):
            cursor, size, deadline = None, 0, time.monotonic() + DISCOVERY_SECONDS
            while len(tools) < MAX_TOOLS:
                if time.monotonic() > deadline:
                    # A server could answer with one empty page after the other.
                    raise Transient(f"the MCP server did not list its tools within {DISCOVERY_SECONDS:g} s")
                listed = await _list_tools(client.session, cursor)
                size += len(msgspec.json.encode(listed))
                if size > MAX_ANSWER_BYTES:
                    raise InvalidMessage("url", f"its MCP server lists more than {MAX_ANSWER_BYTES} bytes of tools")
                found = listed.get("tools")
                tools += map(_mcp_tool, found if isinstance(found, list) else ())
                cursor = listed.get("nextCursor")
                if not isinstance(cursor, str) or not cursor:
                    break
    except EffectFailed as error:
        raise InvalidMessage("url", f"must be the address of an MCP server; it answered: {error.reason}") from error
    return tools[:MAX_TOOLS]


async def _list_tools(session: ClientSession, cursor: str | None) -> dict[str, Any]:
    """Lists tools without the library's check, which refuses the whole list if one tool is malformed."""
    request: dict[str, Any] = {"method": "tools/list", "params": {"cursor": cursor} if cursor else {}}
    options: Any = {"timeout": DISCOVERY_SECONDS}
    session._stamp(request, options)
    return await session._dispatcher.send_raw_request("tools/list", request["params"], options)


def _mcp_tool(raw: Any) -> McpTool:
    """Reads a listed tool. A tool without a valid name or schema is left out later, with the reason."""
    fields: dict[str, Any] = raw if isinstance(raw, dict) else {"inputSchema": "not an object"}
    texts = [text for key in ("description", "title") if isinstance(text := fields.get(key), str) and text]
    hints = fields.get("annotations")
    repeatable = isinstance(hints, dict) and (hints.get("readOnlyHint") is True or hints.get("idempotentHint") is True)
    name = fields.get("name")
    return McpTool(
        name if isinstance(name, str) else "", texts[0] if texts else "", fields.get("inputSchema"), repeatable
    )


async def call(
    outgoing: Outgoing, url: str, headers: Mapping[str, str], name: str, call: ToolRequest, files: ResultFiles
) -> Any:
    """Calls the server's tool `name`. Returns its structured content, else its text, else its blocks.

    Pictures, sounds and files go to `files`.

    Raises EffectFailed with the tool's own message, Transient if the request was not sent, Unanswered if the server
    did not answer, and TooLarge if the answer is too large.
    """
    async with _connected(outgoing, url, headers, call.seconds) as (client, progress):
        progress.sent = True
        meta: Any = {KEY_META: call.key}
        params = mcp_types.CallToolRequestParams(name=name, arguments=call.arguments, _meta=meta)
        # Not by `call_tool`: it lists all tools after each call, and applies the server's schema for the result on the
        # event loop, which may take any time.
        result = await client.session.send_request(mcp_types.CallToolRequest(params=params), mcp_types.CallToolResult)
        return result_value(result, files)


def result_value(result: mcp_types.CallToolResult, files: ResultFiles) -> Any:
    """Returns the content of a result for the model, without binary data. Raises EffectFailed for a failed call."""
    texts = [_block_text(block, files) for block in result.content]
    if result.is_error:
        raise EffectFailed("\n".join(texts)[:2000] or "the tool failed without a message")
    if result.structured_content is None:
        return "\n".join(texts)
    # The protocol repeats the structured content as text. Blocks of other kinds are only in the list.
    notes = [
        text for block, text in zip(result.content, texts, strict=True) if not isinstance(block, mcp_types.TextContent)
    ]
    return {"result": result.structured_content, "more": notes} if notes else result.structured_content


def _block_text(block: Any, files: ResultFiles) -> str:
    match block:
        case mcp_types.TextContent():
            return block.text
        case mcp_types.ImageContent() | mcp_types.AudioContent():
            return files.take(block.type, block.mime_type, block.data)
        case mcp_types.EmbeddedResource(resource=mcp_types.TextResourceContents() as resource):
            return resource.text
        case mcp_types.EmbeddedResource(resource=mcp_types.BlobResourceContents() as resource):
            name = str(resource.uri).rpartition("/")[2]
            return files.take("file", resource.mime_type or "unknown type", resource.blob, name)
        case mcp_types.ResourceLink():
            return f"[link to {block.uri}{f': {block.description}' if block.description else ''}]"
        case _:
            return f"[{type(block).__name__} left out]"


class _Progress(httpx2.AsyncBaseTransport):
    """Limits the size of answers, and keeps the state that decides how an error is classified."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport
        self.sent = False
        """The tool may have received the call."""
        self.status = 0
        """HTTP status of the last answer to a message. 0 before the first one."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.extensions["max_bytes"] = MAX_ANSWER_BYTES
        response = await self._transport.handle_async_request(request)
        if request.method == "POST":  # not the end of the session
            self.status = response.status_code
        response.stream = _Counted(response.stream)
        return response


class _Counted(httpx2.AsyncByteStream):
    """Limits the objects and lists of an answer: the library takes 100 times as much memory for them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = 0
        async for piece in self._stream:
            parts += piece.count(b"{") + piece.count(b"[")
            if parts > MAX_PARTS:
                raise TooLarge(f"answer: has more than {MAX_PARTS} objects and lists")
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


@asynccontextmanager
async def _connected(
    outgoing: Outgoing, url: str, headers: Mapping[str, str], seconds: float
) -> AsyncIterator[tuple[Client, _Progress]]:
    """Opens a session with the server. Converts the library's errors, which come in nested groups, to ours."""
    progress = _Progress(outgoing.transport())
    http = httpx2.AsyncClient(transport=progress, headers=dict(headers), timeout=seconds, trust_env=False)
    try:
        async with (
            http,
            Client(
                streamable_http_client(url, http_client=http, max_sse_event_size=None),
                cache=None,
                client_info=mcp_types.Implementation(name="clawbus", version=VERSION),
                read_timeout_seconds=seconds,
            ) as client,
        ):
            yield client, progress
    except Exception as error:
        raise _converted(error, progress) from error


def _converted(error: BaseException, progress: _Progress) -> Exception:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    match error:
        case EffectFailed() | InvalidMessage() | TooLarge():
            return error
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            return Transient(f"the MCP server cannot be reached ({type(error).__name__})")
        case MCPError() if error.code not in (mcp_types.REQUEST_TIMEOUT, mcp_types.CONNECTION_CLOSED):
            if progress.sent and progress.status == 404:
                # The server has lost the session, and has not made the call: the next attempt opens another one.
                # https://modelcontextprotocol.io/specification/2025-06-18/basic/transports#session-management
                return Transient("the MCP server does not know its session any more (HTTP 404)")
            status = f" (HTTP {progress.status})" if progress.status >= 400 else ""
            return EffectFailed(f"{error.message[:500]}{status}")
        case ValidationError() as invalid:
            fields = ", ".join(".".join(map(str, e["loc"])) or e["msg"] for e in invalid.errors()[:3])
            return EffectFailed(f"the answer of the MCP server does not follow the protocol: {fields}"[:500])
        case RuntimeError():
            # The library has no error of its own for a version that it does not know, and for other broken promises.
            return EffectFailed(f"the answer of the MCP server does not follow the protocol: {error}"[:500])
        case MCPError() | httpx2.TransportError():
            reason = f"the MCP server did not answer ({type(error).__name__})"
            return Unanswered(reason) if progress.sent else Transient(reason)
        case Exception():
            return error
        case _:
            raise error
