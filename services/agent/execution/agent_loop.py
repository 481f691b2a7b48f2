"""How an agent comes to its answer: look up, ask the model, call the tools that it asks for, ask again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol
from uuid import UUID

import grpc.aio
import msgspec
from opentelemetry.trace import Span, SpanKind

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, NotFound, Transient
from infra.observe import telemetry
from infra.postgres.tx import derived_id
from infra.stores.cache import Cache
from infra.web import rpc
from infra.web.json_schema import check
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from services.agent.definitions.models import Colleague, NewAgent
from services.agent.execution.budget import Spending
from services.agent.execution.children import MAX_DEPTH, QUESTION, Question, State
from services.agent.execution.conversation import Asked, Summary
from services.agent.execution.deltas import Deltas
from services.agent.execution.steps import Journal, Metered, Scope, Step, StepFailed, ToolResult, digest
from services.agent.models.contract import (
    Answer,
    Answered,
    Model,
    Passage,
    Prompt,
    Returned,
    Said,
    Tool,
    ToolCall,
    Turn,
    Usage,
)
from services.agent.runs.domain import Suspend, messages_at
from services.agent.runs.notices import FAILED, NO_CREDIT, UNCERTAIN, Child, Ended, Suspended

MODEL_ATTEMPTS = 5
# Of a model that has a fallback.
HASTY_ATTEMPTS = 2
HASTY_PAUSE = timedelta(seconds=2)
# An answer that is not as the agent's schema asks is asked for again.
STRUCTURE_ATTEMPTS = 3
TOOL_ATTEMPTS = 3
TOOL_SECONDS = 60.0
RETRIEVE_SECONDS = 10.0
# Longer questions are cut for the search, longer results of tools for the model.
QUERY_CHARACTERS = 2_000
RESULT_CHARACTERS = 50_000
# What an answer is reckoned to have at most, where the agent sets no limit.
OUTPUT_TOKENS = 1_024
# Of most texts and tokenizers, roughly.
BYTES_PER_TOKEN = 4
# A hold outlives the run's own time limit by this, so that it is there until the usage is counted.
HOLD_MARGIN = timedelta(minutes=5)

# Of what is too old to be shown to the model, the newest part.
SUMMARISED_CHARACTERS = 160_000
SUMMARISE = (
    "Put this conversation in short, for yourself: what the person wants and has told, what was answered and promised. "
    "Keep names, numbers and dates. Write nothing else."
)
# In the journal, in the place of a digest: other runs of the session may have made a summary before this one goes on.
SUMMARY = "summary"

_WHO = {Said: "Person", Answered: "Assistant"}
_PROVIDERS = {"google": "gcp.gemini"}


@dataclass(frozen=True)
class Peers:
    """What a run is made with."""

    memory: memory_pb2_grpc.MemoryStub
    billing: billing_pb2_grpc.BillingStub
    plugin: plugin_pb2_grpc.PluginStub
    cache: Cache


@dataclass(frozen=True)
class Reply:
    """What a run answers. summary: what it has made of what was said before, for the runs to come. calls: of tools of
    the caller, who is to come again with what they gave back.
    """

    text: str
    summary: Summary | None
    calls: tuple[ToolCall, ...] = ()


class Surroundings(Protocol):
    """What the run can learn of while it goes on."""

    async def arrived(self, skipped: int) -> Sequence[str]:
        """The texts of the run's messages that there are now, without the first so many."""
        ...

    async def child(self, step: int) -> State | None:
        """The run that answers the step; None: there is none yet."""
        ...

    async def family(self) -> Sequence[UUID]:
        """The run itself and all that it has asked for."""
        ...


@dataclass
class Answering:
    """One attempt of one run. models: by name, each asked where the one before gives no answer."""

    peers: Peers
    agent: NewAgent
    models: Sequence[tuple[str, Model]]
    scope: Scope
    journal: Journal
    spending: Spending
    surroundings: Surroundings
    _taken: int = field(init=False)
    _metadata: grpc.aio.Metadata = field(init=False)

    def __post_init__(self) -> None:
        self._taken = messages_at(self.scope.journal, 0)
        self._metadata = rpc.tenant_metadata(self.scope.tenant_id)

    async def answer(self, asked: Asked) -> Reply:
        """Raises Ended where there is none, Transient where the run is to go on later."""
        given = asked.given
        theirs = {tool.name: tool for tool in given.tools}
        if both := self.agent.tool_names & theirs.keys():
            # Looked at when the message came; the agent has been changed since.
            raise Ended("failed", f"tools of the agent and of the caller have one name: {', '.join(sorted(both))}")
        summary = await self._summary(asked)
        passages = await self._retrieve(asked.text) if self.agent.knowledge else ()
        tools = (*await self._tools(), *given.tools)
        turns: list[Turn] = [*asked.history, Said(asked.text), *given.since]
        known = summary or asked.summary
        instructions = asked.system(self.agent.system_prompt) + (
            f"\n\nWhat was said before, in short:\n{known.text}" if known else ""
        )
        schema = asked.output_schema(self.agent.output_schema)
        system, misfits = instructions, 0
        # Once before each step: what is taken in by twos before one step is a single turn to whoever goes on with the
        # run, and the step would be another one.
        await self._take(turns)
        while True:
            prompt = Prompt(
                system, tuple(turns), passages, tools, self._output_limit(), schema, given.must_call, given.parallel
            )
            answer = await self._ask(prompt, digest(turns[len(asked.history) :], passages, misfits))
            # Where it calls both kinds at once its own are left: the caller could not say in its next request what came
            # of them, and the model, which would not know, would call them again.
            calls = tuple(call for call in answer.calls if call.name in theirs)[: None if given.parallel else 1]
            if answer.calls and not calls:
                turns.append(Answered(answer.text, answer.calls))
                turns += await self._call_all(answer.calls)
                await self._take(turns)
                continue
            if await self._take(turns):
                continue  # the answer would not answer all of it
            if not answer.text.strip() and not calls:
                raise Ended("failed", f"{self.agent.model}: the answer is empty", FAILED)
            if calls:
                misfit = next(filter(None, (_misfit_of_call(theirs[call.name], call) for call in calls)), None)
            else:
                misfit = "no tool was called" if given.must_call else _misfit(schema, answer.text)
            if misfit is None:
                return Reply(answer.text, summary, calls)
            misfits += 1
            if misfits == STRUCTURE_ATTEMPTS:
                raise Ended("failed", f"{self.agent.model}: the answer does not fit: {misfit}", FAILED)
            system = f"{instructions}\n\nAn answer of yours was refused, for {misfit}."

    async def _summary(self, asked: Asked) -> Summary | None:
        """What is too old to be shown, in short; None where there is nothing, or no model made it."""
        under_way = self.journal.next_digest() == SUMMARY
        if not under_way and not (asked.older and self.journal.next_is_unknown()):
            return None
        before = [asked.summary.text] if asked.summary else []
        said = [f"{_WHO[type(turn)]}: {turn.text}" for exchange in asked.older for turn in exchange.turns]
        transcript = "\n".join([*before, *said])[-SUMMARISED_CHARACTERS:]
        try:
            answer = await self._ask(Prompt(SUMMARISE, (Said(transcript),)), SUMMARY)
        except Ended as error:
            if error.status != "failed":
                raise
            return None
        if not answer.text.strip():
            return None
        about = frozenset().union(*(exchange.about for exchange in asked.older))
        seq = asked.older[-1].seq if asked.older else 0
        return Summary(answer.text, seq, about | (asked.summary.about if asked.summary else frozenset()))

    async def _take(self, turns: list[Turn]) -> bool:
        """Takes in what has come meanwhile, at this place of the run for ever. False where there is nothing."""
        if self.journal.next_is_unknown():
            texts = await self.surroundings.arrived(self._taken)
            if texts:
                await self.journal.take_messages(self._taken + len(texts))
        else:
            known = messages_at(self.scope.journal, self.scope.n + 1) - self._taken
            texts = (await self.surroundings.arrived(self._taken))[:known] if known else ()
        self._taken += len(texts)
        if text := "\n".join(filter(None, texts)):
            turns.append(Said(text))
        return bool(text)

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
                step = Step("retrieve", "", digest(text))
                return await self.journal.step(step, call, tuple[Passage, ...])
            except StepFailed as error:
                raise Ended("failed", f"retrieval: {error}", FAILED) from error

    async def _tools(self) -> tuple[Tool, ...]:
        """Those of the agent's tools that can be used now; asked anew by each attempt, for the model's sake only."""
        agents = tuple(Tool(other.name, other.description, QUESTION) for other in self.agent.agents)
        if not self.agent.tools:
            return agents
        request = plugin_pb2.ToolsRequest(names=self.agent.tools)
        reply = await self.peers.plugin.Tools(request, metadata=self._metadata)
        tools = (Tool(tool.name, tool.description, msgspec.json.decode(tool.schema_json)) for tool in reply.tools)
        return (*tools, *agents)

    async def _ask(self, prompt: Prompt, of: str) -> Answer:
        """The answer of the first model that gives one. Raises Ended."""
        *others, (last, model) = self.models
        for name, other in others:
            # Where there is another one it is not waited for for long.
            with suppress(StepFailed):
                step = Step("model", name, of, HASTY_ATTEMPTS, patience=HASTY_PAUSE)
                return await self._ask_one(name, other, prompt, step)
        try:
            return await self._ask_one(last, model, prompt, Step("model", last, of, MODEL_ATTEMPTS))
        except StepFailed as error:
            raise Ended("failed", str(error), FAILED) from error

    async def _ask_one(self, name: str, model: Model, prompt: Prompt, step: Step) -> Answer:
        hold, nanos = await self._reserve(name, prompt) if self.journal.next_is_new() else (None, 0)
        family, _, own_name = name.partition("/")
        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": _PROVIDERS.get(family, family),
            "gen_ai.request.model": own_name,
            "gen_ai.conversation.id": self.scope.session_key,
        }

        with telemetry.span(f"chat {own_name}", SpanKind.CLIENT, attributes=attributes) as span:
            written = 0

            async def call(_: str, attempt: int) -> tuple[Answer, Metered]:
                deltas = Deltas(self.peers.cache, self.scope.run_id, self.scope.n, attempt)

                async def on_text(text: str) -> None:
                    nonlocal written
                    written += len(text.encode())
                    # What may be refused yet is shown to nobody: a stream takes nothing back.
                    if prompt.output_schema is None and not prompt.must_call:
                        await deltas(text)

                answer = await model.answer(prompt, on_text)
                _note_answer(span, answer)
                assert hold
                return answer, Metered(name, answer.usage, hold, nanos)

            def lost(elsewhere: bool) -> Metered | None:
                """Providers charge what they have begun to answer; of an attempt elsewhere that must be assumed."""
                if not written and not elsewhere:
                    return None
                usage = Usage(input_tokens=_tokens(len(msgspec.json.encode(prompt))), output_tokens=_tokens(written))
                return Metered(name, usage, None)

            try:
                return await self.journal.step(replace(step, lost=lost), call, Answer)
            except (StepFailed, Ended):
                await self._release(hold)
                raise

    async def _reserve(self, model: str, prompt: Prompt) -> tuple[UUID, int]:
        """The hold for the next model call, the same at each attempt, and what it holds. Raises Ended where there is no
        credit for it."""
        quantities = {"input_tokens": _input_tokens(prompt), "output_tokens": prompt.max_output_tokens or OUTPUT_TOKENS}
        hold = derived_id(self.scope.run_id, "hold", self.scope.n + 1, *quantities.values())
        expires = timedelta(seconds=self.scope.limits.seconds) + HOLD_MARGIN
        request = billing_pb2.ReserveRequest(
            hold_id=str(hold),
            resource=model,
            quantities=quantities,
            expires_in_ms=int(expires / timedelta(milliseconds=1)),
        )
        reply = await self.peers.billing.Reserve(request, metadata=self._metadata)
        if not reply.granted:
            raise Ended("refused", "the tenant's credit does not suffice for a model call", NO_CREDIT)
        limit = self.scope.limits.nanos
        if limit is not None and await self._spent() + reply.held_nanos > limit:
            await self._release(hold)
            raise Ended("failed", f"the limit of {limit} nano-units would be passed by another model call", FAILED)
        budget = self.agent.budget
        if budget and not await self.spending.add(budget, self.scope.n + 1, reply.held_nanos):
            await self._release(hold)
            raise Ended("refused", f"the agent's budget of this {budget.period} is used up", NO_CREDIT)
        return hold, reply.held_nanos

    async def _spent(self) -> int:
        """What the run has cost; where that is not known yet, what was reserved for it."""
        spent = self.scope.reserved()
        for run_id in await self.surroundings.family():
            request = billing_pb2.ChargesRequest(run_id=str(run_id))
            reply = await self.peers.billing.Charges(request, metadata=self._metadata)
            spent |= {
                charge.usage_id: charge.amount_nanos for charge in reply.charges if charge.HasField("amount_nanos")
            }
        return sum(spent.values())

    async def _release(self, hold: UUID | None) -> None:
        if hold is None:
            return
        request = billing_pb2.ReleaseRequest(hold_id=str(hold))
        with suppress(Transient):  # then it ends by itself
            await self.peers.billing.Release(request, metadata=self._metadata)

    async def _call_all(self, calls: Sequence[ToolCall]) -> list[Turn]:
        """What the tools gave back, called together. Before any of them, a person lets those be called that need it."""
        denied = set()
        for n, call in enumerate(calls, 1):
            if call.name in self.agent.approval:
                decision = self.journal.approval(n)
                if decision is None:
                    raise self.journal.ask(n, call.name, call.arguments)
                if decision == "deny":
                    denied.add(n)
        others = sum(any(other.name == call.name for other in self.agent.agents) for call in calls)
        made = [self._refuse(call) if n in denied else self._call(call, others) for n, call in enumerate(calls, 1)]
        # All come to their end: what one of them raises must not leave another's effect behind unrecorded.
        contents = await asyncio.gather(*made, return_exceptions=True)
        errors = [content for content in contents if isinstance(content, BaseException)]
        if waits := [error for error in errors if isinstance(error, Suspended)]:
            # The run waits for the first; the other agents that were asked need not wait for that one.
            waits[0].children = [child for each in waits for child in each.children]
        for kind in (asyncio.CancelledError, Ended, Suspended, BaseException):
            for error in errors:
                if isinstance(error, kind):
                    raise error
        return [Returned(call, str(content)) for call, content in zip(calls, contents, strict=True)]

    async def _refuse(self, tool: ToolCall) -> str:
        await self.journal.refuse(_tool_step(tool), "a person has refused this call")
        return "Error: a person has refused this call"

    async def _call(self, tool: ToolCall, others: int) -> str:
        """What the tool gave back; where it failed, what the model is told about it. others: how many of the calls that
        are made together are other agents'."""
        if other := next((other for other in self.agent.agents if other.name == tool.name), None):
            return await self._ask_agent(tool, other, others)
        n = self.scope.n + 1

        async def call(idempotency_key: str, _: int) -> tuple[ToolResult, None]:
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
            try:
                returned = await self.journal.step(_tool_step(tool), call, ToolResult)
            except StepFailed as error:
                return f"Error: {error}"
            if returned.unknown is not None:
                text = f"{tool.name}: {returned.unknown}"
                key = self.scope.session_key
                raise Suspended(Suspend(key, "indeterminate", n, tool.name, text, utcnow()), UNCERTAIN)
            return returned.result

    async def _ask_agent(self, call: ToolCall, other: Colleague, others: int) -> str:
        n, step = self.scope.n + 1, _tool_step(call)
        try:
            question = msgspec.json.decode(call.arguments, type=Question).message
        except msgspec.DecodeError as error:
            await self.journal.refuse(step, f"arguments: {error}")
            return f"Error: arguments: {error}"
        if self.scope.depth >= MAX_DEPTH:
            reason = "agents have asked each other too often"
            await self.journal.refuse(step, reason)
            return f"Error: {reason}"
        try:
            if (known := await self.journal.begun(step)) is not None:
                return known.result
        except StepFailed as error:
            return f"Error: {error}"
        child = await self.surroundings.child(n)
        if child and child.is_over:
            await self.journal.ended(n, child.reply, child.error)
            return child.reply if child.reply is not None else f"Error: {child.error}"
        text = f"step {n}: waits for the agent {other.name}"
        suspend = Suspend(self.scope.session_key, "agent", n, other.name, text, utcnow())
        if child:
            raise Suspended(suspend, None)
        limit = self.scope.limits.nanos
        # Together they spend no more than is left.
        left = None if limit is None else max(0, limit - await self._spent()) // others
        raise Suspended(suspend, None, [Child(n, other.agent_id, question, left)])

    def _output_limit(self) -> int | None:
        most = self.scope.limits.tokens
        return None if most is None else max(1, most - self.scope.journal.tokens)


def _misfit_of_call(tool: Tool, call: ToolCall) -> str | None:
    misfit = _misfit(tool.schema, call.arguments, "arguments") if tool.strict else None
    return misfit and f"{tool.name} was called so that {misfit}"


def _misfit(schema: dict[str, Any] | None, text: str, what: str = "answer") -> str | None:
    """Why the text is not what the schema asks for; None: it is."""
    if schema is None:
        return None
    try:
        check(what, schema, msgspec.json.decode(text))
    except msgspec.DecodeError:
        return "it is no JSON"
    except InvalidMessage as error:
        return str(error)
    return None


def _tool_step(tool: ToolCall) -> Step:
    return Step("tool", tool.name, digest(tool.name, tool.arguments), TOOL_ATTEMPTS)


def _returned(reply: plugin_pb2.CallReply) -> ToolResult:
    """Raises EffectFailed where the tool failed."""
    match reply.outcome:
        case plugin_pb2.CallReply.OUTCOME_SUCCEEDED:
            result = reply.result_json
            return ToolResult(
                result if len(result) <= RESULT_CHARACTERS else f"{result[:RESULT_CHARACTERS]}… (cut off)"
            )
        case plugin_pb2.CallReply.OUTCOME_UNKNOWN:
            return ToolResult("", unknown=reply.error or "nobody knows whether it took effect")
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


def _tokens(size: int) -> int:
    """How many tokens a text of so many bytes is reckoned to have, where nobody has counted them."""
    return math.ceil(size / BYTES_PER_TOKEN)


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
