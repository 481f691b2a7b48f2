"""Runs a tool by its kind: built in, over HTTP, or of an MCP server."""

from __future__ import annotations

from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from infra.service.service import Runtime
from protos.memory.v1 import memory_pb2_grpc
from services.plugin.domain import ToolOutput, ToolRequest, without_base64
from services.plugin.files import ResultFiles
from services.plugin.manifest import Access
from services.plugin.registry import Offered
from services.plugin.tools import mcp, remote
from services.plugin.tools.builtin import BUILTIN, Backends


class ToolRunner:
    def __init__(self, cipher: Cipher, backends: Backends) -> None:
        self._cipher = cipher
        self._backends = backends

    async def run(self, offer: Offered, call: ToolRequest) -> ToolOutput:
        """Returns the tool's result.

        Raises EffectFailed if the tool refused, InvalidMessage if its address must not be called, TooLarge if the
        answer is too large, Transient if nothing was sent, and Unanswered if a request was sent and no answer came.
        """
        plugin = offer.plugin
        if plugin is None:
            _, run = BUILTIN[offer.tool.name]
            return ToolOutput(await run(call, self._backends))
        access = Access.open(plugin.access, self._cipher, call.tenant_id, str(plugin.id))
        outgoing: Outgoing = self._backends.outgoing
        files = ResultFiles()
        if plugin.kind == "mcp":
            value = await mcp.call(outgoing, plugin.url, access.headers, offer.remote_name, call, files)
        else:
            value = await remote.call(outgoing, plugin.url, access.headers, access.secret, plugin.config, call)
        value = without_base64(files.taken_out(value))
        return ToolOutput(value, tuple(files.taken))


def tools(runtime: Runtime) -> ToolRunner:
    safe = [f"clawbus.memory.v1.Memory/{method}" for method in ("Retrieve", "ListMemories", "CorrectMemory")]
    channel = runtime.channels.to(runtime.settings.memory_grpc, "memory", safe=safe)
    return ToolRunner(runtime.cipher, Backends(runtime.outgoing, memory_pb2_grpc.MemoryStub(channel)))
