"""Fakes of the services that the agent calls by gRPC (memory, billing, plugin). They are strict and keep a ledger."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

from prometheus_client import CollectorRegistry

from infra.errors import InvalidMessage, NotFound, Transient
from infra.observe.metrics import Metrics
from infra.web import rpc
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from tooling.testing import keys
from tooling.testing.platform import Platform

CALCULATOR = "calculator"
WEATHER = "weather"
FORGET = "memories_forget"
_SCHEMA = {
    CALCULATOR: {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    WEATHER: {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    FORGET: {"type": "object", "properties": {"memory_id": {"type": "string"}}, "required": ["memory_id"]},
}


class FakeMemory(memory_pb2_grpc.MemoryServicer):
    """Returns all passages of the tenant for every query, and keeps the requests to learn."""

    def __init__(self) -> None:
        self.passages: list[tuple[str, str, str]] = []
        """Tenant, text and the document's name."""
        self.requests: list[memory_pb2.RetrieveRequest] = []
        self.away = 0
        """The next calls, this many of them, fail with a transient error."""
        self.known: dict[str, list[memory_pb2.PersonalMemory]] = {}
        """Person → their memories."""
        self.learned: list[memory_pb2.LearnRequest] = []

    async def Retrieve(self, request: memory_pb2.RetrieveRequest, context: Any) -> memory_pb2.RetrieveReply:
        tenant = rpc.tenant()
        if not request.query:
            raise InvalidMessage("query", "is empty")
        if self.away:
            self.away -= 1
            raise Transient("memory is not available")
        self.requests.append(request)
        found = [(text, name) for owner, text, name in self.passages if owner == tenant]
        return memory_pb2.RetrieveReply(
            passages=[
                memory_pb2.Passage(
                    text=text, score=0.9, source=memory_pb2.Source(document_id=f"d{n}", name=name, page=n + 1)
                )
                for n, (text, name) in enumerate(found)
            ]
        )

    async def ListMemories(self, request: memory_pb2.ListMemoriesRequest, context: Any) -> memory_pb2.ListMemoriesReply:
        rpc.tenant()
        return memory_pb2.ListMemoriesReply(memories=self.known.get(request.subject_id, []))

    async def Learn(self, request: memory_pb2.LearnRequest, context: Any) -> memory_pb2.LearnReply:
        rpc.tenant()
        UUID(request.run_id)
        if not request.subject_id or not request.said:
            raise InvalidMessage("subject_id", "and said must not be empty")
        if self.away:
            self.away -= 1
            raise Transient("memory is not available")
        self.learned.append(request)
        return memory_pb2.LearnReply(learned=len(request.facts))


def _of_call(request: billing_pb2.ReserveRequest) -> billing_pb2.ReserveRequest:
    """The request without the run's seconds, whose hold is one of its own: another attempt asks for it again."""
    alone = billing_pb2.ReserveRequest()
    alone.CopyFrom(request)
    alone.ClearField("run_hold_id")
    alone.ClearField("run_seconds")
    return alone


class FakeBilling(billing_pb2_grpc.BillingServicer):
    """Grants every hold to a tenant with credit."""

    def __init__(self) -> None:
        self.broke: set[str] = set()
        """Tenants without credit, and API keys whose budget is spent."""
        self.dear: set[str] = set()
        """Resources for which no credit is enough."""
        self.hurried: set[str] = set()
        """Tenants over their rate."""
        self.silent: set[str] = set()
        """Tenants whose requests for holds are not answered."""
        self.unanswered = 0
        """Number of these requests."""
        self.holds: dict[str, billing_pb2.ReserveRequest] = {}
        """Hold id → the request that made it."""
        self.released: list[str] = []
        """Ids of the holds that were given back."""
        self.unpriced: set[str] = set()
        """Resources without a price."""
        self.charges: dict[str, list[billing_pb2.Charge]] = {}
        """Run id → its charges."""
        self.charges_asked: list[str | list[str]] = []
        """The run of each request for charges, or its runs."""
        self.nanos_per_token = 10
        self.nanos_per_second = 0

    def charge(self, run_id: str, usage_id: str, *, amount_nanos: int) -> None:
        """Adds a counted charge to the run."""
        charge = billing_pb2.Charge(usage_id=usage_id, resource="r", verdict="counted", amount_nanos=amount_nanos)
        charge.occurred_at.GetCurrentTime()
        charge.rated_at.GetCurrentTime()
        self.charges.setdefault(run_id, []).append(charge)

    async def Reserve(self, request: billing_pb2.ReserveRequest, context: Any) -> billing_pb2.ReserveReply:
        tenant = rpc.tenant()
        UUID(request.hold_id)
        if request.expires_in_ms <= 0 or not request.resource or not request.quantities:
            raise InvalidMessage("reserve", "needs expires_in_ms above 0, resource and quantities")
        if _of_call(self.holds.setdefault(request.hold_id, request)) != _of_call(request):
            raise InvalidMessage("hold_id", "was used before with another request")
        if tenant in self.silent:
            self.unanswered += 1
            raise Transient("the stand-in of billing is silent")
        if tenant in self.hurried:
            return billing_pb2.ReserveReply(refused_by="tenant, 1 a minute", retry_later=True, currency="USD")
        granted = not {tenant, request.api_key_id} & self.broke and request.resource not in self.dear
        held = sum(request.quantities.values()) * self.nanos_per_token if granted else 0
        seconds = request.run_seconds * self.nanos_per_second if granted else 0
        return billing_pb2.ReserveReply(granted=granted, held_nanos=held, run_held_nanos=seconds, currency="USD")

    async def Release(self, request: billing_pb2.ReleaseRequest, context: Any) -> billing_pb2.ReleaseReply:
        rpc.tenant()
        self.released.append(request.hold_id)
        return billing_pb2.ReleaseReply()

    async def Unpriced(self, request: billing_pb2.UnpricedRequest, context: Any) -> billing_pb2.UnpricedReply:
        return billing_pb2.UnpricedReply(resources=[name for name in request.resources if name in self.unpriced])

    async def Charges(self, request: billing_pb2.ChargesRequest, context: Any) -> billing_pb2.ChargesReply:
        rpc.tenant()
        self.charges_asked.append(list(request.run_ids) or request.run_id)
        if request.run_ids:
            costs = [_cost(run_id, self.charges.get(run_id, [])) for run_id in request.run_ids]
            return billing_pb2.ChargesReply(costs=costs, currency="USD")
        UUID(request.run_id)
        return billing_pb2.ChargesReply(charges=self.charges.get(request.run_id, []), currency="USD")


def _cost(run_id: str, charges: list[billing_pb2.Charge]) -> billing_pb2.RunCost:
    rated = [charge.amount_nanos for charge in charges if charge.verdict in ("counted", "rejected")]
    return billing_pb2.RunCost(run_id=run_id, records=len(rated), amount_nanos=sum(rated))


class HasCredit:
    """Stands in for billing's stub in the process itself."""

    async def Reserve(self, request: billing_pb2.ReserveRequest, **_: Any) -> billing_pb2.ReserveReply:
        return billing_pb2.ReserveReply(granted=True, held_nanos=1, currency="USD")

    async def Release(self, request: billing_pb2.ReleaseRequest, **_: Any) -> billing_pb2.ReleaseReply:
        return billing_pb2.ReleaseReply()


class FakePlugin(plugin_pb2_grpc.PluginServicer):
    """Three tools that answer with their arguments."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[str, str]] = {}
        """Idempotency key → tool and arguments."""
        self.requests: list[plugin_pb2.CallRequest] = []
        self.effects: Counter[str] = Counter()
        """Idempotency key → number of times that the call took effect."""
        self.speakers: dict[str, str] = {}
        """Idempotency key → the person who speaks, as the agent names them."""
        self.outcomes: dict[str, list[plugin_pb2.CallReply]] = {}
        """Tool → replies to its next calls, in order."""
        self.waits: asyncio.Event | None = None
        """If present, calls continue only after it is set."""
        self.reached = asyncio.Event()
        """Set when a call has arrived."""

    async def Tools(self, request: plugin_pb2.ToolsRequest, context: Any) -> plugin_pb2.ToolsReply:
        rpc.tenant()
        return plugin_pb2.ToolsReply(
            tools=[
                plugin_pb2.Tool(
                    name=name,
                    description=f"The {name}.",
                    schema_json=json.dumps(_SCHEMA[name]),
                    effect=plugin_pb2.Tool.EFFECT_REPEATABLE,
                )
                for name in request.names
                if name in _SCHEMA
            ]
        )

    async def Call(self, request: plugin_pb2.CallRequest, context: Any) -> plugin_pb2.CallReply:
        rpc.tenant()
        if request.tool not in _SCHEMA:
            raise NotFound(f"tool {request.tool}")
        try:
            arguments = json.loads(request.arguments_json)
        except ValueError:
            raise InvalidMessage("arguments", "must be JSON") from None
        if set(arguments) != set(_SCHEMA[request.tool]["properties"]):
            raise InvalidMessage("arguments", "do not fit the schema")
        if not request.idempotency_key:
            raise InvalidMessage("idempotency_key", "is missing")
        asked = request.tool, request.arguments_json
        if self.calls.setdefault(request.idempotency_key, asked) != asked:
            raise InvalidMessage("idempotency_key", "was used before with another call")
        self.requests.append(request)
        self.speakers[request.idempotency_key] = request.speaker_id
        self.reached.set()
        if self.waits:
            await self.waits.wait()
        if scripted := self.outcomes.get(request.tool):
            return scripted.pop(0)
        if not self.effects[request.idempotency_key]:
            self.effects[request.idempotency_key] = 1
        [value] = arguments.values()
        result = json.dumps({"result": f"{request.tool} of {value}"})
        return plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_SUCCEEDED, result_json=result)


class ServiceFakes:
    """The three fakes."""

    def __init__(self) -> None:
        # The agent calls only these methods.
        self.memory = FakeMemory()  # type: ignore[abstract]
        self.billing = FakeBilling()
        self.plugin = FakePlugin()


@asynccontextmanager
async def running_service_fakes(
    platform: Platform, names: Sequence[str] = ("memory", "billing", "plugin")
) -> AsyncIterator[ServiceFakes]:
    """Serves the fakes of these services on the ports at which the platform's services expect the real ones."""
    fakes = ServiceFakes()
    servicers: dict[str, tuple[Callable[[Any, Any], None], Any]] = {
        "memory": (memory_pb2_grpc.add_MemoryServicer_to_server, fakes.memory),
        "billing": (billing_pb2_grpc.add_BillingServicer_to_server, fakes.billing),
        "plugin": (plugin_pb2_grpc.add_PluginServicer_to_server, fakes.plugin),
    }
    async with AsyncExitStack() as stack:
        for name in names:
            add, servicer = servicers[name]
            server = rpc.Server(name, keys.callers(name), Metrics(CollectorRegistry()))
            add(servicer, server.grpc)
            await server.start(platform.ports[f"{name}_grpc"])
            stack.push_async_callback(server.stop)
        yield fakes
