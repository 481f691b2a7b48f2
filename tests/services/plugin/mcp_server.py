"""A real MCP server, made with the official package: ``python -m tests.services.plugin.mcp_server PORT [NAME]``.

NAME: the name of an additional tool.
"""

from __future__ import annotations

import asyncio
import sys

import mcp_types
import uvicorn
from mcp.server import MCPServer
from mcp.server.mcpserver import Context

server = MCPServer("office")


@server.tool(annotations=mcp_types.ToolAnnotations(read_only_hint=True))
def room(floor: int, code: str = "A") -> dict[str, str]:
    """Tells which room is free."""
    return {"room": f"{code}{floor}01"}


@server.tool(name="Send-Mail")
async def send_mail(to: str, context: Context) -> str:
    """Sends a mail."""
    if to == "nobody":
        raise ValueError("no such person")
    if to == "never":
        await asyncio.Event().wait()
    if to == "everybody":
        return "x" * 50_000_000
    meta = context.request_context.meta or {}
    return f"sent to {to} as {meta.get('clawbus/idempotency-key')}"


@server.tool()
def time() -> str:
    """Its name is taken by a built-in tool."""
    return "late"


if __name__ == "__main__":
    if len(sys.argv) > 2:
        server.add_tool(time, name=sys.argv[2])
    uvicorn.run(server.streamable_http_app(), port=int(sys.argv[1]), log_level="warning")
