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
class AllowedCallers:
    """The callers of a gRPC method."""

    callers: tuple[str, ...]
    behalf: Behalf


METHODS: Final[dict[str, AllowedCallers]] = {
    "clawbus.user.v1.Directory/Owners": AllowedCallers(("notification",), "tenant"),
    "clawbus.user.v1.Keys/Scopes": AllowedCallers(("ws_gateway",), "tenant"),
    "clawbus.memory.v1.Memory/Retrieve": AllowedCallers(("agent", "plugin"), "tenant"),
    "clawbus.memory.v1.Memory/ListMemories": AllowedCallers(("agent", "plugin"), "tenant"),
    "clawbus.memory.v1.Memory/CorrectMemory": AllowedCallers(("plugin",), "tenant"),
    "clawbus.memory.v1.Memory/ForgetMemory": AllowedCallers(("plugin",), "tenant"),
    "clawbus.memory.v1.Memory/Learn": AllowedCallers(("agent",), "tenant"),
    "clawbus.memory.v1.Memory/ReadFile": AllowedCallers(("channel",), "tenant"),
    "clawbus.memory.v1.Memory/KeepFile": AllowedCallers(("channel",), "tenant"),
    "clawbus.memory.v1.Memory/ForgetFiles": AllowedCallers(("channel",), "tenant"),
    "clawbus.billing.v1.Billing/Reserve": AllowedCallers(("agent", "memory"), "tenant"),
    "clawbus.billing.v1.Billing/Release": AllowedCallers(("agent", "memory"), "tenant"),
    "clawbus.billing.v1.Billing/Charges": AllowedCallers(("agent",), "tenant"),
    "clawbus.billing.v1.Billing/Unpriced": AllowedCallers(("agent",), "tenant"),
    "clawbus.plugin.v1.Plugin/Tools": AllowedCallers(("agent",), "tenant"),
    "clawbus.plugin.v1.Plugin/Call": AllowedCallers(("agent",), "tenant"),
    "clawbus.ops.v1.Operations/ListDeadLetters": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/GetDeadLetter": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/RedriveDeadLetters": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/GroupDeadLetters": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/RedriveMatching": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/DiscardDeadLetter": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/CheckHealth": AllowedCallers(("log_aggregator",), "either"),
    "clawbus.ops.v1.Operations/CountOutbox": AllowedCallers(("billing",), "either"),
    # The kernel's sample, which only tests and benches run.
    "clawbus.sample.v1.Sample/Seen": AllowedCallers(("sample_ledger",), "operator"),
}


@dataclass(frozen=True)
class DelegatedRoute:
    """An HTTP route on which a service may act for a client of a tenant."""

    caller: str
    callee: str
    method: str
    path: str
    scope: str
    """The only scope that the request has."""


ROUTES: Final[tuple[DelegatedRoute, ...]] = (
    DelegatedRoute("channel", "agent", "GET", "/api/v1/agents/{agent_id}", "read"),
    DelegatedRoute("ws_gateway", "agent", "GET", "/api/v1/agents", "read"),
    DelegatedRoute("ws_gateway", "agent", "GET", "/api/v1/agents/{agent_id}", "read"),
    DelegatedRoute("ws_gateway", "agent", "GET", "/api/v1/runs/{run_id}", "read"),
    DelegatedRoute("ws_gateway", "agent", "GET", "/internal/runs/{run_id}/events", "read"),
    DelegatedRoute("ws_gateway", "agent", "POST", "/internal/agents/{agent_id}/completions", "run"),
    DelegatedRoute("ws_gateway", "agent", "POST", "/api/v1/agents/{agent_id}/sessions/{key:path}/messages", "run"),
    DelegatedRoute("ws_gateway", "agent", "POST", "/api/v1/runs/{run_id}/cancel", "run"),
)
