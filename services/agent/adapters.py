"""Clients of the services that the agent calls."""

from __future__ import annotations

from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from infra.stores.objects import Objects
from protos.billing.v1 import billing_pb2_grpc
from protos.memory.v1 import memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2_grpc


def memory(runtime: Runtime) -> memory_pb2_grpc.MemoryStub:
    safe = [f"clawbus.memory.v1.Memory/{method}" for method in ("Retrieve", "ListMemories", "Learn")]
    return memory_pb2_grpc.MemoryStub(runtime.channels.to(runtime.settings.memory_grpc, "memory", safe=safe))


def billing(runtime: Runtime) -> billing_pb2_grpc.BillingStub:
    """All calls may be repeated: with the same hold_id the second Reserve or Release changes nothing."""
    safe = [f"clawbus.billing.v1.Billing/{method}" for method in ("Reserve", "Release", "Charges", "Unpriced")]
    return billing_pb2_grpc.BillingStub(runtime.channels.to(runtime.settings.billing_grpc, "billing", safe=safe))


def plugin(runtime: Runtime) -> plugin_pb2_grpc.PluginStub:
    """Both calls may be repeated: the plugin service keeps the result of a call under its idempotency key."""
    safe = [f"clawbus.plugin.v1.Plugin/{method}" for method in ("Tools", "Call")]
    return plugin_pb2_grpc.PluginStub(runtime.channels.to(runtime.settings.plugin_grpc, "plugin", safe=safe))


def objects(runtime: Runtime) -> Objects | None:
    settings = runtime.settings
    if settings.s3_endpoint is None:
        return None
    return Objects(settings.s3_endpoint, settings.s3_access_key, settings.s3_secret_key.get_secret_value())


def subjects(runtime: Runtime) -> SubjectKeys:
    return SubjectKeys(runtime.cipher)
