"""What the agent calls."""

from __future__ import annotations

from infra.lanes.group import Group
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from infra.stores.cache import Cache
from protos.billing.v1 import billing_pb2_grpc
from protos.memory.v1 import memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2_grpc
from services.agent.execution.agent_loop import Peers
from services.agent.execution.executor import Executor
from services.agent.execution.watch import Watch
from services.agent.models.library import Models
from services.agent.runs.projections import CANCELLED


def memory(runtime: Runtime) -> memory_pb2_grpc.MemoryStub:
    safe = ["clawbus.memory.v1.Memory/Retrieve"]
    return memory_pb2_grpc.MemoryStub(runtime.channels.to(runtime.settings.memory_grpc, "memory", safe=safe))


def billing(runtime: Runtime) -> billing_pb2_grpc.BillingStub:
    """Reserving twice with one hold_id is reserving once, and so is releasing."""
    safe = [f"clawbus.billing.v1.Billing/{method}" for method in ("Reserve", "Release", "Charges")]
    return billing_pb2_grpc.BillingStub(runtime.channels.to(runtime.settings.billing_grpc, "billing", safe=safe))


def plugin(runtime: Runtime) -> plugin_pb2_grpc.PluginStub:
    """A call carries its idempotency key, and the plugin service keeps the result: so both may be repeated."""
    safe = [f"clawbus.plugin.v1.Plugin/{method}" for method in ("Tools", "Call")]
    return plugin_pb2_grpc.PluginStub(runtime.channels.to(runtime.settings.plugin_grpc, "plugin", safe=safe))


def subjects(runtime: Runtime) -> SubjectKeys:
    return SubjectKeys(runtime.cipher)


def executor(runtime: Runtime) -> Executor:
    return Executor(
        runtime.worker,
        Models(runtime.outgoing.transport()),
        Peers(memory(runtime), billing(runtime), plugin(runtime), Cache(runtime.cache)),
        Group(runtime.worker, CANCELLED),
        Watch(runtime.worker),
        runtime.cipher,
    )
