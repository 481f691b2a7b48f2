"""The calls between services: which service may call which gRPC method or HTTP route, and on whose behalf.

A service refuses every other call, so one that was taken over can do no more than its own part. `./claw map` shows the
calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Behalf = Literal["tenant", "operator", "either"]
"""tenant: the call names a tenant and concerns it alone. operator: it names none and concerns the whole platform."""


@dataclass(frozen=True)
class Call:
    """The callers of a gRPC method."""

    callers: tuple[str, ...]
    behalf: Behalf


METHODS: Final[dict[str, Call]] = {
    "clawbus.user.v1.Directory/Owners": Call(("notification",), "tenant"),
    "clawbus.user.v1.Keys/Scopes": Call(("ws_gateway",), "tenant"),
    "clawbus.memory.v1.Memory/Retrieve": Call(("agent", "plugin"), "tenant"),
    "clawbus.memory.v1.Memory/ListMemories": Call(("agent", "plugin"), "tenant"),
    "clawbus.memory.v1.Memory/CorrectMemory": Call(("plugin",), "tenant"),
    "clawbus.memory.v1.Memory/ForgetMemory": Call(("plugin",), "tenant"),
    "clawbus.memory.v1.Memory/Learn": Call(("agent",), "tenant"),
    "clawbus.memory.v1.Memory/ReadFile": Call(("channel",), "tenant"),
    "clawbus.billing.v1.Billing/Reserve": Call(("agent",), "tenant"),
    "clawbus.billing.v1.Billing/Release": Call(("agent",), "tenant"),
    "clawbus.billing.v1.Billing/Charges": Call(("agent",), "tenant"),
    "clawbus.billing.v1.Billing/Unpriced": Call(("agent",), "tenant"),
    "clawbus.plugin.v1.Plugin/Tools": Call(("agent",), "tenant"),
    "clawbus.plugin.v1.Plugin/Call": Call(("agent",), "tenant"),
    "clawbus.ops.v1.Operations/ListDeadLetters": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/GetDeadLetter": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/RedriveDeadLetters": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/GroupDeadLetters": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/RedriveMatching": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/DiscardDeadLetter": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/CheckHealth": Call(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/CountOutbox": Call(("billing",), "either"),
    # The kernel's sample, which only tests and benches run.
    "clawbus.sample.v1.Sample/Seen": Call(("sample_ledger",), "operator"),
}


@dataclass(frozen=True)
class Route:
    """An HTTP route on which a service may act for a client of a tenant."""

    caller: str
    callee: str
    method: str
    path: str
    scope: str
    """The only scope that the request has."""


ROUTES: Final[tuple[Route, ...]] = (
    Route("channel", "agent", "GET", "/api/v1/agents/{agent_id}", "read"),
    Route("ws_gateway", "agent", "GET", "/api/v1/agents", "read"),
    Route("ws_gateway", "agent", "GET", "/api/v1/runs/{run_id}", "read"),
    Route("ws_gateway", "agent", "GET", "/internal/runs/{run_id}/events", "read"),
    Route("ws_gateway", "agent", "POST", "/internal/agents/{agent_id}/completions", "run"),
    Route("ws_gateway", "agent", "POST", "/api/v1/agents/{agent_id}/sessions/{key:path}/messages", "run"),
    Route("ws_gateway", "agent", "POST", "/api/v1/runs/{run_id}/cancel", "run"),
)
