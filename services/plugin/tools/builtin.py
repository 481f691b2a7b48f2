"""The tools of every tenant: time, calculator, http_fetch, knowledge_search, and those of memories. A repeated call
changes nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from infra.clock import utcnow
from infra.errors import EffectFailed
from infra.outgoing.client import Outgoing
from infra.outgoing.shares import Shares
from infra.web import rpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.plugin.domain import Tool, ToolRequest
from services.plugin.tools import memories, pages
from services.plugin.tools.calculator import MAX_CHARACTERS, CannotCalculate, calculate

MAX_PAGE_BYTES = 2 * 1024 * 1024
MAX_PAGE_TEXT = 20_000
_TEXTS = ("text/", "application/json", "application/xml", "application/xhtml+xml")


@dataclass(frozen=True)
class Backends:
    """The clients that the built-in tools call."""

    outgoing: Outgoing
    memory: memory_pb2_grpc.MemoryStub
    readers: Shares = field(default_factory=lambda: Shares(pages.MAX_READERS))
    """The processes that read pages."""


async def time(call: ToolRequest, _: Backends) -> Any:
    zone = call.arguments.get("timezone", "UTC")
    try:
        now = utcnow().astimezone(ZoneInfo(zone))
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise EffectFailed(
            f"timezone: {zone!r} is not a name of the IANA database; use one like Europe/Berlin"
        ) from None
    return {
        "timezone": zone,
        "iso": now.isoformat(timespec="seconds"),
        "date": now.date().isoformat(),
        "time": now.strftime("%H:%M:%S"),
        "weekday": now.strftime("%A"),
        "unix": int(now.timestamp()),
    }


async def calculator(call: ToolRequest, _: Backends) -> Any:
    try:
        answer = calculate(call.arguments["expression"])
    except CannotCalculate as error:
        raise EffectFailed(f"expression: {error}") from None
    return {"result": answer.value, "exact": answer.exact, **({"fraction": answer.fraction} if answer.fraction else {})}


async def http_fetch(call: ToolRequest, backends: Backends) -> Any:
    url = call.arguments["url"]
    answer = await backends.outgoing.request("GET", url, timeout=call.seconds, max_bytes=MAX_PAGE_BYTES)
    if 300 <= answer.status < 400:
        raise EffectFailed(
            f"HTTP {answer.status}: the page moved to {answer.headers.get('location', 'another address')}"
        )
    if answer.status >= 400:
        raise EffectFailed(f"HTTP {answer.status}")
    kind, _, parameters = answer.headers.get("content-type", "text/plain").lower().partition(";")
    kind = kind.strip()
    if not kind.startswith(_TEXTS):
        raise EffectFailed(f"{kind}: only text can be read")
    try:
        async with asyncio.timeout(call.seconds), backends.readers.place(call.tenant_id):
            title, text = await pages.read(kind, answer.body, _charset(parameters), MAX_PAGE_TEXT)
    except (TimeoutError, pages.UnreadablePage):
        raise EffectFailed("the page takes too much time or memory to be read") from None
    return {
        "url": url,
        "content_type": kind,
        "title": title,
        "text": text[:MAX_PAGE_TEXT],
        "truncated": len(text) > MAX_PAGE_TEXT,
    }


async def knowledge_search(call: ToolRequest, backends: Backends) -> Any:
    request = memory_pb2.RetrieveRequest(
        query=call.arguments["query"],
        limit=call.arguments.get("limit", 0),
        agent_id=call.agent_id,
        session_key=call.session_key,
        channel_id=str(call.channel_id or ""),
        api_key_id=call.api_key_id,
        member_id=str(call.member_id or ""),
        tag=call.tag,
    )
    reply = await backends.memory.Retrieve(request, timeout=call.seconds, metadata=rpc.tenant_metadata(call.tenant_id))
    return {
        "passages": [
            {
                "text": passage.text,
                "score": round(passage.score, 4),
                "source": {
                    "document_id": passage.source.document_id,
                    "name": passage.source.name,
                    "section": passage.source.section if passage.source.HasField("section") else None,
                    "page": passage.source.page if passage.source.HasField("page") else None,
                },
            }
            for passage in reply.passages
        ]
    }


def _charset(parameters: str) -> str | None:
    for parameter in parameters.split(";"):
        name, _, value = parameter.strip().partition("=")
        if name == "charset":
            return value.strip("\"'")
    return None


def _tool(name: str, description: str, required: list[str], **properties: Any) -> Tool:
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(name, description, schema, "repeatable")


_MEMORY_ID = {"type": "string", "minLength": 1, "maxLength": 64, "description": "An id of memories_list"}

Run = Callable[[ToolRequest, Backends], Awaitable[Any]]

BUILTIN: dict[str, tuple[Tool, Run]] = {
    tool.name: (tool, run)
    for tool, run in (
        (
            _tool(
                "calculator",
                "Calculates exactly. Use it for every calculation. Understands + - * / // % **, brackets, sqrt, abs, "
                "round(number, places), floor, ceil, min, max, sum, pi and e.",
                ["expression"],
                expression={
                    "type": "string",
                    "minLength": 1,
                    "maxLength": MAX_CHARACTERS,
                    "description": "For example (12.5 + 3) * 1.19",
                },
            ),
            calculator,
        ),
        (
            _tool(
                "http_fetch",
                "Reads a public web page or a JSON document by its address and returns its text.",
                ["url"],
                url={"type": "string", "maxLength": 4000, "description": "Begins with https:// or http://"},
            ),
            http_fetch,
        ),
        (
            _tool(
                "knowledge_search",
                "Searches the documents of this organisation and returns the passages nearest in meaning, with their "
                "sources.",
                ["query"],
                query={"type": "string", "minLength": 1, "maxLength": 2000},
                limit={"type": "integer", "minimum": 1, "maximum": 20},
            ),
            knowledge_search,
        ),
        (
            _tool(
                "memories_list",
                "Lists the memories of the person who speaks, the newest first, with their origin. Use it if "
                "the person asks for them, and to find the memory_id before a change.",
                [],
                before={
                    "type": "string",
                    "maxLength": 64,
                    "description": "The id of the last memory that you have seen, if the list said that there are more",
                },
            ),
            lambda call, backends: memories.listed(call, backends.memory),
        ),
        (
            _tool(
                "memories_correct",
                "Replaces the text of one memory of the person who speaks, if they say that it is wrong.",
                ["memory_id", "text"],
                memory_id=_MEMORY_ID,
                text={
                    "type": "string",
                    "minLength": 1,
                    "maxLength": 500,
                    "description": "The whole sentence, as the person says it: I am no longer vegetarian.",
                },
            ),
            lambda call, backends: memories.corrected(call, backends.memory),
        ),
        (
            _tool(
                "memories_forget",
                "Deletes one memory of the person who speaks. Use it only if they ask to forget it.",
                ["memory_id"],
                memory_id=_MEMORY_ID,
            ),
            lambda call, backends: memories.forgotten(call, backends.memory),
        ),
        (
            _tool(
                "time",
                "Tells the current date, time and weekday.",
                [],
                timezone={"type": "string", "maxLength": 64, "description": "IANA name, such as Asia/Shanghai; UTC"},
            ),
            time,
        ),
    )
}
