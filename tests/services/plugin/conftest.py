"""The plugin service as a process, and a tenant's tool server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from infra.web import rpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from tests.services.plugin.toolserver import ToolServer, tool_server
from tooling.testing.platform import Platform

CallReply = plugin_pb2.CallReply


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[ToolServer]:
    async with tool_server() as running:
        yield running


@pytest.fixture(scope="module")
async def plugin(platform: Platform) -> Platform:
    await platform.prepare("plugin")
    await platform.start("plugin")
    return platform


def tool(name: str, effect: str = "keyed", **properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"name": name, "description": f"Does {name}.", "schema": schema, "effect": effect}


async def register(platform: Platform, tenant: str, server: ToolServer, *tools: dict[str, Any], **more: Any) -> Any:
    """Registers the tool server for a tenant. Returns the plugin."""
    body = {"name": "shop", "kind": "http", "url": server.url, "secret": server.secret, "tools": tools, **more}
    async with platform.client("plugin", tenant) as client:
        answer = await client.post("/api/v1/plugins", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()


async def call(
    platform: Platform, tenant: str, tool: str, arguments: str = "{}", *, key: str, timeout: float = 20, **more: str
) -> plugin_pb2.CallReply:
    stub = plugin_pb2_grpc.PluginStub(platform.channels("agent").to(platform.grpc("plugin"), "plugin"))
    request = plugin_pb2.CallRequest(tool=tool, arguments_json=arguments, idempotency_key=key, **more)
    reply: plugin_pb2.CallReply = await stub.Call(request, timeout=timeout, metadata=rpc.tenant_metadata(tenant))
    return reply
