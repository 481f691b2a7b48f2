"""Tools of MCP servers (https://modelcontextprotocol.io), over the transport "Streamable HTTP"."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import mcp_types
import msgspec
from mcp import Client, ClientSession, MCPError
from mcp.client.streamable_http import streamable_http_client
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from infra import VERSION
from infra.errors import EffectFailed, InvalidMessage, RetryLater, TooLarge, Transient, Unanswered
from infra.outgoing.client import Outgoing
from infra.outgoing.retry_after import retry_after
from services.plugin.domain import McpTool, ToolRequest
from services.plugin.files import ResultFiles
from services.plugin.tools.remote import DEFAULT_RETRY

# A picture of some megabytes is left out of the result, and the text beside it is kept.
MAX_ANSWER_BYTES = 8 * 1024 * 1024
MAX_TOOLS = 200
DISCOVERY_SECONDS = 15.0
# A result that is passed on has fewer.
MAX_PARTS = 30_000

# In the request's ``_meta``, for servers that drop repeats. The protocol itself has no field for an idempotency key.
KEY_META = "clawbus/idempotency-key"

# The first line of a stream of events.
_EVENT = re.compile(rb"(event|data|id|retry)?:")

# The library logs session ids, and at level DEBUG the contents of messages.
logging.getLogger("mcp").setLevel(logging.WARNING)


async def discover(outgoing: Outgoing, url: str, headers: Mapping[str, str]) -> list[McpTool]:
    """Returns the tools that the server at `url` offers, at most 200.

    Raises InvalidMessage (field ``url``) if it is too large or not of an MCP server, and (field ``headers``) if the
    server refuses access; Transient if there is none.
    """
    tools: list[McpTool] = []
    try:
        async with _connected(outgoing, url, headers, DISCOVERY_SECONDS) as (client, _):
            cursor, size, deadline = None, 0, time.monotonic() + DISCOVERY_SECONDS
            while len(tools) < MAX_TOOLS:
                if time.monotonic() > deadline:
                    # A server could answer with one empty page after the other.
                    raise Transient(f"the MCP server did not list its tools within {DISCOVERY_SECONDS:g} s")
                page: dict[str, Any] = {"cursor": cursor} if cursor else {}
                listed = await _send(client.session, "tools/list", page, DISCOVERY_SECONDS)
                size += len(msgspec.json.encode(listed))
                if size > MAX_ANSWER_BYTES:
                    raise InvalidMessage("url", f"its MCP server lists more than {MAX_ANSWER_BYTES} bytes of tools")
                found = listed.get("tools")
                tools += map(_mcp_tool, found if isinstance(found, list) else ())
                cursor = listed.get("nextCursor")
                if not isinstance(cursor, str) or not cursor:
                    break
    except _NoAccess as error:
        raise InvalidMessage("headers", error.reason) from error
    except EffectFailed as error:
        raise InvalidMessage("url", f"must be the address of an MCP server; it answered: {error.reason}") from error
    return tools[:MAX_TOOLS]


async def _send(session: ClientSession, method: str, params: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Sends a request without the library's check of the answer: it refuses the whole list if one tool is malformed,
    and the whole result if one block is."""
    request: dict[str, Any] = {"method": method, "params": params}
    options: Any = {"timeout": seconds}
    session._stamp(request, options)
    return await session._dispatcher.send_raw_request(method, request["params"], options)


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
    """Calls the server's tool `name`. Returns its structured content, else its text, else its blocks. Words that the
    structured content does not repeat are beside it: ``{"result", "more"}``.

    Pictures, sounds and files go to `files`.

    Raises EffectFailed with the tool's own message, Transient if the server has not made the call, Unanswered if it
    did not answer, and TooLarge if the answer is too large.
    """
    async with _connected(outgoing, url, headers, call.seconds) as (client, progress):
        progress.sent = True
        params = {"name": name, "arguments": call.arguments, "_meta": {KEY_META: call.key}}
        # Not by `call_tool`: it lists all tools after each call, and applies the server's schema for the result on the
        # event loop, which may take any time.
        raw = await _send(client.session, "tools/call", params, call.seconds)
        result = Result.model_validate(raw, by_name=False)
        if not result.model_fields_set & {"content", "structured_content"}:
            raise EffectFailed("the answer of the MCP server does not follow the protocol: it has no content")
        return result_value(result, files)


class Result(mcp_types.CallToolResult):
    """A result that may have structured content alone, and blocks that are malformed or of an unknown kind: a note
    takes their place, and the other blocks are kept."""

    content: list[Any] = Field(default_factory=list)

    @field_validator("content", mode="before")
    @classmethod
    def _known(cls, blocks: Any) -> Any:
        return [_known(block) for block in blocks] if isinstance(blocks, list) else (blocks or [])


_BLOCK: TypeAdapter[mcp_types.ContentBlock] = TypeAdapter(mcp_types.ContentBlock)


def _known(block: Any) -> mcp_types.ContentBlock:
    try:
        return _BLOCK.validate_python(block)
    except ValidationError:
        kind = block.get("type") if isinstance(block, dict) else None
        return mcp_types.TextContent(text=f"[{kind if isinstance(kind, str) else 'block'} left out]"[:100])


def result_value(result: mcp_types.CallToolResult, files: ResultFiles) -> Any:
    """Returns the content of a result for the model, without binary data. Raises EffectFailed for a failed call."""
    texts = [_block_text(block, files) for block in result.content]
    structured = result.structured_content
    if result.is_error:
        if not any(texts) and structured:
            texts = [msgspec.json.encode(structured).decode()]
        raise EffectFailed("\n".join(texts)[:2000] or "the tool failed without a message")
    if structured is None:
        return "\n".join(texts)
    known = _parts(structured)
    more = [
        text
        for block, text in zip(result.content, texts, strict=True)
        if not isinstance(block, mcp_types.TextContent) or (text.strip() and not _canonical(text) & known)
    ]
    return {"result": structured, "more": more} if more else structured


def _parts(structured: Any) -> set[bytes]:
    """The structured content and its parts. The protocol wants a text that repeats it, and packages for servers write
    one text for each item. Other texts are words for the model beside it."""
    # An object, or any JSON from 2026-07-28 on.
    values = list(structured.values()) if isinstance(structured, dict) else [structured]
    items = [item for value in values if isinstance(value, list) for item in value]
    return {msgspec.json.encode(part, order="sorted") for part in (structured, *values, *items)}


def _canonical(text: str) -> set[bytes]:
    """The text as JSON, and the JSON that it has."""
    found = {msgspec.json.encode(text)}
    with suppress(msgspec.DecodeError, RecursionError):
        found.add(msgspec.json.encode(msgspec.json.decode(text), order="sorted"))
    return found


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
        self.after = DEFAULT_RETRY
        """The delay that this answer names."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.extensions["max_bytes"] = MAX_ANSWER_BYTES
        response = await self._transport.handle_async_request(request)
        response.stream = body = _Counted(response.stream)
        if request.method == "POST":  # not the end of the session
            self.status = response.status_code
            self.after = retry_after(response.headers) or DEFAULT_RETRY
            try:
                type_ = _type_of(await body.beginning())
            except BaseException:
                await body.aclose()
                raise
            if type_ and not response.headers.get("content-type", "").lower().startswith(type_):
                # Proxies and small servers name none, or another one.
                response.headers["content-type"] = type_
        return response


def _type_of(beginning: bytes) -> str | None:
    """The type of a message of the protocol, by its content. None for anything else, such as a page of a proxy."""
    if beginning.startswith(b"{"):
        return "application/json"
    return "text/event-stream" if _EVENT.match(beginning) else None


class _Counted(httpx2.AsyncByteStream):
    """Limits the objects and lists of an answer: the library takes 100 times as much memory for them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._pieces = self._counted()
        self._first = b""

    async def beginning(self) -> bytes:
        """The first piece without the space before its text; empty if there is none."""
        self._first = await anext(self._pieces, b"")
        return self._first.lstrip()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._first
        async for piece in self._pieces:
            yield piece

    async def _counted(self) -> AsyncGenerator[bytes]:
        parts = 0
        async for piece in self._stream:
            parts += piece.count(b"{") + piece.count(b"[")
            if parts > MAX_PARTS:
                raise TooLarge(f"answer: has more than {MAX_PARTS} objects and lists")
            yield piece

    async def aclose(self) -> None:
        await self._pieces.aclose()
        await self._stream.aclose()


class _NoAccess(EffectFailed):
    """The server wants credentials, or others."""


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
        case MCPError() if progress.status in (429, 503):
            return RetryLater(progress.after, f"HTTP {progress.status}")
        case MCPError() if not (_is_unanswered(error) or progress.status in (502, 504)):
            status = f" (HTTP {progress.status})" if progress.status >= 400 else ""
            if progress.status in (401, 403):
                return _NoAccess(f"the MCP server refuses access{status}; the headers must have its credentials")
            if progress.sent and _has_lost_session(error, progress.status):
                # The server has not made the call: the next attempt opens another session.
                return Transient(f"the MCP server does not know its session any more{status}")
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


def _is_unanswered(error: MCPError) -> bool:
    """Whether the library says so, by its words: servers use the same codes for errors of their own."""
    return error.code in (mcp_types.CONNECTION_CLOSED, mcp_types.REQUEST_TIMEOUT) and (
        error.message.startswith(("Connection closed", "SSE stream ")) or error.message.endswith("timed out")
    )


def _has_lost_session(error: MCPError, status: int) -> bool:
    """https://modelcontextprotocol.io/specification/2025-06-18/basic/transports#session-management

    Servers by the example of the official TypeScript package answer 400 instead of 404.
    """
    return status == 404 or (status == 400 and "session" in error.message.lower())
