"""How an agent comes to its answer: look up, ask the model, call the tools that it asks for, ask again."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import grpc.aio
import msgspec
from opentelemetry.trace import Span, SpanKind

from infra import rpc, telemetry
from infra.cache import Cache
from infra.errors import EffectFailed, NotFound, Transient
from infra.tx import derived_id
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from services.agent.definitions.models import NewAgent
from services.agent.models.contract import Answer, Answered, Model, Passage, Prompt, Returned, Said, Tool, ToolCall
from services.agent.runs.budget import Spending
from services.agent.runs.conversation import Asked
from services.agent.runs.deltas import Deltas
from services.agent.runs.ending import FAILED, NO_CREDIT, UNCERTAIN, Ended
from services.agent.runs.steps import Journal, Metered, Scope, Step, StepFailed

MODEL_ATTEMPTS = 5
TOOL_ATTEMPTS = 3
TOOL_SECONDS = 60.0
RETRIEVE_SECONDS = 10.0
# Longer questions are cut for the search, longer results of tools for the model.
QUERY_CHARACTERS = 2_000
RESULT_CHARACTERS = 50_000
# What an answer is reckoned to have at most, where the agent sets no limit.
OUTPUT_TOKENS = 1_024
# A hold outlives the run's own time limit by this, so that it is there until the usage is counted.
HOLD_MARGIN = timedelta(minutes=5)

_PROVIDERS = {"google": "gcp.gemini"}


@dataclass(frozen=True)
class Peers:
    """What a run is made with."""

    memory: memory_pb2_grpc.MemoryStub
    billing: billing_pb2_grpc.BillingStub
    plugin: plugin_pb2_grpc.PluginStub
    cache: Cache


class _Returned(msgspec.Struct, frozen=True):
    """A tool's result as the journal keeps it. `unknown`: nobody knows whether it took effect, and why."""

    result: str
    unknown: str | None = None


@dataclass
class Answering:
    """One attempt of one run."""

    peers: Peers
    agent: NewAgent
    model: Model
    scope: Scope
    journal: Journal
    spending: Spending
    _metadata: grpc.aio.Metadata = field(init=False)

    def __post_init__(self) -> None:
        self._metadata = rpc.tenant_metadata(self.scope.tenant_id)

    async def answer(self, asked: Asked) -> str:
        """The reply. Raises Ended where there is none, Transient where the run is to go on later."""
        passages = await self._retrieve(asked.text) if self.agent.knowledge else ()
        tools = await self._tools()
        turns = [*asked.history, Said(asked.text)]
        while True:
            prompt = Prompt(asked.system(self.agent.system_prompt), tuple(turns), passages, tools, self._output_limit())
            answer = await self._ask(prompt)
            if not answer.calls:
                if not answer.text.strip():
                    raise Ended("failed", f"{self.agent.model}: the answer is empty", FAILED)
                return answer.text
            turns.append(Answered(answer.text, answer.calls))
            for call in answer.calls:
                turns.append(Returned(call, await self._call(call)))

    async def _retrieve(self, text: str) -> tuple[Passage, ...]:
        async def call(_: str, attempt: int) -> tuple[tuple[Passage, ...], None]:
            request = memory_pb2.RetrieveRequest(query=text[:QUERY_CHARACTERS])
            try:
                reply = await self.peers.memory.Retrieve(request, metadata=self._metadata, timeout=RETRIEVE_SECONDS)
            except NotFound:
                return (), None
            return tuple(_passage(found) for found in reply.passages), None

        with telemetry.span("retrieval", SpanKind.CLIENT, attributes={"gen_ai.operation.name": "retrieval"}):
            try:
                return await self.journal.step(Step("retrieve", "", "repeatable"), call, tuple[Passage, ...])
            except StepFailed as error:
                raise Ended("failed", f"retrieval: {error}", FAILED) from error

    async def _tools(self) -> tuple[Tool, ...]:
        """Those of the agent's tools that can be used now; asked anew by each attempt, for the model's sake only."""
        if not self.agent.tools:
            return ()
        request = plugin_pb2.ToolsRequest(names=self.agent.tools)
        reply = await self.peers.plugin.Tools(request, metadata=self._metadata)
        return tuple(Tool(tool.name, tool.description, msgspec.json.decode(tool.schema_json)) for tool in reply.tools)

    async def _ask(self, prompt: Prompt) -> Answer:
        hold = await self._reserve(prompt) if self.journal.next_is_new() else None
        family, _, own_name = self.agent.model.partition("/")
        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(family, family),
            "gen_ai.request.model": own_name,
            "gen_ai.conversation.id": self.scope.session_key,
        }

        with telemetry.span(f"chat {own_name}", SpanKind.CLIENT, attributes=attributes) as span:

            async def call(_: str, attempt: int) -> tuple[Answer, Metered]:
                deltas = Deltas(self.peers.cache, self.scope.run_id, self.scope.n, attempt)
                answer = await self.model.answer(prompt, deltas)
                _note_answer(span, answer)
                assert hold
                return answer, Metered(self.agent.model, answer.usage, hold)

            try:
                step = Step("model", self.agent.model, "repeatable", MODEL_ATTEMPTS)
                return await self.journal.step(step, call, Answer)
            except (StepFailed, Ended) as error:
                await self._release(hold)
                if isinstance(error, Ended):
                    raise
                raise Ended("failed", str(error), FAILED) from error

    async def _reserve(self, prompt: Prompt) -> UUID:
        """The hold for the next model call, the same at each attempt. Raises Ended where there is no credit for it."""
        quantities = {"input_tokens": _input_tokens(prompt), "output_tokens": prompt.max_output_tokens or OUTPUT_TOKENS}
        hold = derived_id(self.scope.run_id, "hold", self.scope.n + 1, *quantities.values())
        expires = timedelta(seconds=self.scope.limits.seconds) + HOLD_MARGIN
        request = billing_pb2.ReserveRequest(
            hold_id=str(hold),
            resource=self.agent.model,
            quantities=quantities,
            expires_in_ms=int(expires / timedelta(milliseconds=1)),
        )
        reply = await self.peers.billing.Reserve(request, metadata=self._metadata)
        if not reply.granted:
            raise Ended("refused", "the tenant's credit does not suffice for a model call", NO_CREDIT)
        budget = self.agent.budget
        if budget and not await self.spending.add(budget, self.scope.n + 1, reply.held_nanos):
            await self._release(hold)
            raise Ended("refused", f"the agent's budget of this {budget.period} is used up", NO_CREDIT)
        return hold

    async def _release(self, hold: UUID | None) -> None:
        if hold is None:
            return
        request = billing_pb2.ReleaseRequest(hold_id=str(hold))
        with suppress(Transient):  # then it ends by itself
            await self.peers.billing.Release(request, metadata=self._metadata)

    async def _call(self, tool: ToolCall) -> str:
        """What the tool gave back; where it failed, what the model is told about it."""

        async def call(idempotency_key: str, _: int) -> tuple[_Returned, None]:
            if tool.name not in self.agent.tools:
                # Also where the tenant has it: what an agent may do is not for the model to say.
                raise NotFound(f"there is no tool {tool.name}")
            request = plugin_pb2.CallRequest(
                tool=tool.name, arguments_json=tool.arguments or "{}", idempotency_key=idempotency_key
            )
            reply = await self.peers.plugin.Call(request, metadata=self._metadata, timeout=TOOL_SECONDS)
            return _returned(reply), None

        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": tool.name,
            "gen_ai.tool.call.id": tool.id,
        }
        with telemetry.span(f"execute_tool {tool.name}", attributes=attributes):
            step = Step("tool", tool.name, "keyed", TOOL_ATTEMPTS)
            try:
                returned = await self.journal.step(step, call, _Returned)
            except StepFailed as error:
                return f"Error: {error}"
            if returned.unknown is not None:
                raise Ended("indeterminate", f"{tool.name}: {returned.unknown}", UNCERTAIN)
            return returned.result

    def _output_limit(self) -> int | None:
        most = self.scope.limits.tokens
        return None if most is None else max(1, most - self.scope.journal.tokens)


def _returned(reply: plugin_pb2.CallReply) -> _Returned:
    """Raises EffectFailed where the tool failed."""
    match reply.outcome:
        case plugin_pb2.CallReply.OUTCOME_SUCCEEDED:
            result = reply.result_json
            return _Returned(result if len(result) <= RESULT_CHARACTERS else f"{result[:RESULT_CHARACTERS]}… (cut off)")
        case plugin_pb2.CallReply.OUTCOME_UNKNOWN:
            return _Returned("", unknown=reply.error or "nobody knows whether it took effect")
        case _:
            raise EffectFailed(reply.error or "the tool failed")


def _passage(found: memory_pb2.Passage) -> Passage:
    source = found.source
    return Passage(
        text=found.text,
        score=found.score,
        document_id=source.document_id,
        name=source.name,
        section=source.section if source.HasField("section") else None,
        page=source.page if source.HasField("page") else None,
    )


def _input_tokens(prompt: Prompt) -> int:
    """The most that the prompt may have: no tokenizer makes more of a text than a token per three bytes, roughly."""
    return len(msgspec.json.encode(prompt)) // 3 + 1


def _note_answer(span: Span, answer: Answer) -> None:
    span.set_attribute("gen_ai.response.model", answer.model)
    span.set_attribute("gen_ai.response.finish_reasons", [answer.finish_reason])
    usage = {
        "gen_ai.usage.input_tokens": answer.usage.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": answer.usage.cached_tokens,
        "gen_ai.usage.output_tokens": answer.usage.output_tokens,
        "gen_ai.usage.reasoning.output_tokens": answer.usage.reasoning_tokens,
    }
    span.set_attributes({name: count for name, count in usage.items() if count is not None})
