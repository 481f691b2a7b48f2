"""Tools of MCP servers (https://modelcontextprotocol.io), over the transport "Streamable HTTP"."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import mcp_types
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from infra import VERSION
from infra.errors import EffectFailed, InvalidMessage, TooLarge, Transient, Unanswered
from infra.outgoing.client import Outgoing
from services.plugin.domain import MAX_RESULT_BYTES, Call

# A result comes in an envelope. A server sends a structured result a second time, as text.
MAX_ANSWER_BYTES = 4 * MAX_RESULT_BYTES
MAX_TOOLS = 200
DISCOVERY_SECONDS = 15.0
# In the request's ``_meta``, for servers that drop repeats. The protocol itself has no field for an idempotency key.
KEY_META = "clawbus/idempotency-key"

# The library logs session ids, and at level DEBUG the contents of messages.
logging.getLogger("mcp").setLevel(logging.WARNING)


async def discover(outgoing: Outgoing, url: str, headers: Mapping[str, str]) -> list[mcp_types.Tool]:
    """Returns the tools that the server at `url` offers, at most 200.

    Raises InvalidMessage (field ``url``) if the answer is not from an MCP server, and Transient if there is no answer.
    """
    tools: list[mcp_types.Tool] = []
    try:
        async with _connected(outgoing, url, headers, DISCOVERY_SECONDS) as (client, _):
            cursor = None
            while len(tools) < MAX_TOOLS:
                listed = await client.list_tools(cursor=cursor)
                tools += listed.tools
                if not (cursor := listed.next_cursor):
                    break
    except EffectFailed as error:
        raise InvalidMessage("url", f"must be the address of an MCP server; it answered: {error.reason}") from error
    return tools[:MAX_TOOLS]


async def call(outgoing: Outgoing, url: str, headers: Mapping[str, str], name: str, call: Call) -> Any:
    """Calls the server's tool `name`. Returns its structured content, else its text, else its blocks.

    Raises EffectFailed with the tool's own message, Transient if the request was not sent, Unanswered if the server
    did not answer, and TooLarge if the answer is too large.
    """
    async with _connected(outgoing, url, headers, call.seconds) as (client, progress):
        progress.sent = True
        meta: Any = {KEY_META: call.key}
        result = await client.call_tool(name, call.arguments, meta=meta)
        texts = [block.text for block in result.content if isinstance(block, mcp_types.TextContent)]
        if result.is_error:
            raise EffectFailed("\n".join(texts)[:2000] or "the tool failed without a message")
        if result.structured_content is not None:
            return result.structured_content
        if len(texts) == len(result.content):
            return "\n".join(texts)
        return [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]


class _Progress(httpx2.AsyncBaseTransport):
    """Limits the size of answers, and keeps the state that decides how an error is classified."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        self._transport = transport
        self.sent = False
        """The tool may have received the call."""
        self.status = 0
        """HTTP status of the last answer. 0 before the first one."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        request.extensions["max_bytes"] = MAX_ANSWER_BYTES
        response = await self._transport.handle_async_request(request)
        self.status = response.status_code
        return response


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
            status = f" (HTTP {progress.status})" if progress.status >= 400 else ""
            return EffectFailed(f"{error.message[:500]}{status}")
        case MCPError() | httpx2.TransportError():
            reason = f"the MCP server did not answer ({type(error).__name__})"
            return Unanswered(reason) if progress.sent else Transient(reason)
        case Exception():
            return error
        case _:
            raise error
