"""gRPC of plugin: lists the tools of a tenant and runs one."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

import grpc.aio
import msgspec

from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.service.service import Runtime
from infra.web import rpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from services.plugin import registry
from services.plugin.calls import Calls
from services.plugin.domain import ToolRequest
from services.plugin.runner import tools

MAX_ARGUMENT_BYTES = 256 * 1024
MAX_SECONDS = 300.0
# Part of the caller's time that is reserved for recording the outcome and returning it.
MARGIN_SECONDS = 1.0
# The key becomes a header and the id of a Standard Webhook. Such an id must not contain a full stop.
_KEY = re.compile(r"[A-Za-z0-9_:/-]{1,200}")

_EFFECTS = {
    "repeatable": plugin_pb2.Tool.EFFECT_REPEATABLE,
    "keyed": plugin_pb2.Tool.EFFECT_KEYED,
    "once": plugin_pb2.Tool.EFFECT_ONCE,
}
_OUTCOMES = {
    "succeeded": plugin_pb2.CallReply.OUTCOME_SUCCEEDED,
    "failed": plugin_pb2.CallReply.OUTCOME_FAILED,
    "unknown": plugin_pb2.CallReply.OUTCOME_UNKNOWN,
}


class PluginRpc(plugin_pb2_grpc.PluginServicer):
    def __init__(self, database: Database, calls: Calls) -> None:
        self._database = database
        self._calls = calls

    async def Tools(
        self, request: plugin_pb2.ToolsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> plugin_pb2.ToolsReply:
        async with self._database.begin(tenant_id=rpc.tenant()) as tx:
            found = await registry.offered(tx, request.names)
        return plugin_pb2.ToolsReply(
            tools=[
                plugin_pb2.Tool(
                    name=offer.tool.name,
                    description=offer.tool.description,
                    schema_json=msgspec.json.encode(offer.tool.schema).decode(),
                    effect=_EFFECTS[offer.tool.effect],
                )
                for offer in found
            ]
        )

    async def Call(
        self, request: plugin_pb2.CallRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> plugin_pb2.CallReply:
        if not _KEY.fullmatch(request.idempotency_key):
            raise InvalidMessage("idempotency_key", "must be 1 to 200 characters out of letters, digits, _ : / -")
        remaining = context.time_remaining() or 0.0
        call = ToolRequest(
            rpc.tenant(),
            request.tool,
            _arguments(request.arguments_json),
            request.idempotency_key,
            min(MAX_SECONDS, remaining - min(MARGIN_SECONDS, remaining / 4)),
            request.agent_id,
            request.subject_id,
            request.speaker_id,
            _uuid("hold_id", request.hold_id),
            _uuid("channel_id", request.channel_id),
            request.session_key,
            request.api_key_id,
            _uuid("member_id", request.member_id),
            _uuid("run_id", request.run_id),
            request.tag,
        )
        outcome = await self._calls.call(call)
        return plugin_pb2.CallReply(
            outcome=_OUTCOMES[outcome.state],
            result_json=outcome.result,
            error=outcome.error,
            files=[plugin_pb2.File(name=file.name, content=file.content) for file in outcome.files],
        )


def _uuid(field: str, text: str) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        raise InvalidMessage(field, "must be a UUID") from None


def _arguments(text: str) -> dict[str, Any]:
    if len(text) > MAX_ARGUMENT_BYTES:
        raise InvalidMessage("arguments", f"must be at most {MAX_ARGUMENT_BYTES} bytes")
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidMessage("arguments", "must be a JSON object") from None


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], Any]:
    lease = timedelta(seconds=runtime.settings.lease_seconds)
    calls = Calls(runtime.request, runtime.cipher, tools(runtime), lease)
    return plugin_pb2_grpc.add_PluginServicer_to_server, PluginRpc(runtime.request, calls)
