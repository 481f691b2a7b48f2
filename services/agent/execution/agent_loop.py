"""The agent loop: retrieve knowledge, ask the model, call the tools that it asks for, ask again until it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from opentelemetry.trace import SpanKind

from infra.errors import InvalidMessage, NotFound
from infra.lanes.effects import ItemEnded
from infra.observe import telemetry
from infra.postgres.tx import MAX_MESSAGE_BYTES
from infra.web import data_urls
from infra.web.json_schema import check
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from services.agent.definitions.models import NewAgent
from services.agent.execution.context import RunContext
from services.agent.execution.conversation import Conversation, SessionSummary
from services.agent.execution.group_write import MessagesArrived
from services.agent.execution.model_calls import ModelCalls
from services.agent.execution.outcome import Ended, Reply
from services.agent.execution.steps import StepFailed, Steps, StepSpec, digest
from services.agent.execution.tools import Tools
from services.agent.models.contract import (
    AssistantTurn,
    ModelAnswer,
    Passage,
    Prompt,
    Tool,
    ToolCall,
    Turn,
    UserTurn,
)
from services.agent.runs.domain import messages_at
from services.agent.runs.notices import FAILED
from services.agent.sessions.changes import DELETED_TEXT

# An answer that does not fit the agent's schema is asked for again, up to so many answers.
STRUCTURE_ATTEMPTS = 3
# A longer answer would not fit into the message that reports it, beside the rest of that message.
MAX_ANSWER_BYTES = MAX_MESSAGE_BYTES - 100_000
MAX_REFUSAL = 4_000
"""Characters of a refusal that a person reads."""
RETRIEVE_SECONDS = 10.0
# A longer question is cut before the search.
QUERY_CHARACTERS = 2_000

# Why an answer was cut, by its finish reason. Its last call may be cut, even if its arguments are JSON by chance.
CUTS = {"length": "the answer reached the limit of tokens", "content_filter": "a content filter cut the answer off"}
CUT = "{}, so this call may be cut and was not made; ask again with less"

# The newest part of the older conversation goes into the summary.
SUMMARISED_CHARACTERS = 160_000
SUMMARISE = (
    "Summarise this conversation for yourself: the person's wishes and statements, the answers and promises given. "
    "Keep names, numbers and dates. Write nothing else."
)
# Stands in the journal instead of a digest: before this run goes on, another run of the session may make a summary.
SUMMARY = "summary"

_SPEAKERS = {UserTurn: "Person", AssistantTurn: "Assistant"}


@dataclass
class AgentLoop:
    """One attempt of one run."""

    context: RunContext
    agent: NewAgent
    steps: Steps
    models: ModelCalls
    tools: Tools
    memory: memory_pb2_grpc.MemoryStub
    complete: Callable[[Reply, int], Awaitable[ItemEnded | Reply]]
    """Ends the run with the reply. Raises MessagesArrived if the run has another number of messages."""
    _messages: int = field(init=False)
    """How many of the run's messages the model has been shown."""
    _taken_before: int = 0
    """The step before which messages were taken last."""
    _is_changed: bool = False
    """As in `Conversation`. The digests in the journal are of the former text, so they are not compared."""

    def __post_init__(self) -> None:
        self._messages = messages_at(self.context.state, 0)

    async def answer(self, conversation: Conversation) -> ItemEnded | Reply:
        """Returns the result of `complete`.

        Raises Ended if there is no answer, Suspended if the run has to wait, Transient if it goes on later.
        """
        given = conversation.given
        callers_tools = {tool.name: tool for tool in given.tools}
        if both := self.agent.tool_names & callers_tools.keys():
            # Checked when the message came, but the agent may have changed since.
            raise Ended("failed", f"tools of the agent and of the caller have one name: {', '.join(sorted(both))}")
        self._is_changed = conversation.is_changed
        summary = await self._summary(conversation)
        passages = await self._retrieve(conversation.text) if self.agent.knowledge else ()
        tools = (*await self.tools.offered(), *given.tools)
        turns: list[Turn] = [*conversation.history, UserTurn(conversation.text, conversation.images), *given.since]
        known = summary or conversation.summary
        instructions = conversation.system(self.agent.system_prompt) + (
            f"\n\nSummary of the conversation so far:\n{known.text}" if known else ""
        )
        schema = conversation.output_schema(self.agent.output_schema)
        system, misfits = instructions, 0
        if not given.since:
            # A message that joined the run as it started is one turn with the others.
            self._taken_before = 1
        await self._take_messages(turns)
        while True:
            prompt = Prompt(
                system,
                tuple(turns),
                passages,
                tools,
                self._output_limit(given.sampling.max_output_tokens),
                schema,
                given.must_call,
                given.parallel,
                given.sampling,
            )
            input_digest = self._digest(turns[len(conversation.history) :], passages, misfits)
            try:
                answer = await self.models.ask(prompt, input_digest, self._messages)
            except MessagesArrived:
                await self._take_messages(turns)
                continue
            # If the model calls tools of both kinds at once, the agent's own are dropped: the caller could not report
            # their results in its next request, and the model would call them again.
            calls = tuple(call for call in answer.calls if call.name in callers_tools)
            calls = calls if given.parallel else calls[:1]
            cut = CUTS.get(answer.finish_reason)
            is_limited = answer.finish_reason == "length" and given.sampling.max_output_tokens is not None
            # A caller that limits the answer, or whose tools it calls, gets a cut answer as far as it goes, also if it
            # is empty or does not fit. It gets none of the calls.
            as_it_is = cut is not None and (is_limited or bool(calls))
            if as_it_is:
                calls = ()
            elif answer.calls and not calls:
                turns.append(AssistantTurn(data_urls.named(answer.text), answer.calls, answer.reasoning))
                if cut:
                    turns += await self.tools.refuse_all(answer.calls, CUT.format(cut))
                else:
                    turns += await self.tools.call_all(answer.calls)
                await self._take_messages(turns)
                continue
            if await self._take_messages(turns):
                continue  # This answer would not cover the new messages.
            if answer.finish_reason == "refusal" and (schema is not None or given.must_call):
                # No reply that a program expects. The person reads the model's words. They are not in the error, which
                # outlives the person's data.
                error = f"{self.agent.model}: the model refused to answer"
                raise Ended("failed", error, answer.text[:MAX_REFUSAL])
            if as_it_is or (given.sampling.stop and not answer.text and not answer.calls):
                misfit = None
            else:
                misfit = await self._misfit(answer, calls, callers_tools, schema, must_call=given.must_call)
            if misfit is None:
                text, files = await self.tools.files.of_answer(answer.text)
                filtered = answer.finish_reason == "content_filter"
                reply = Reply(text, summary, calls, "length" if cut else "stop", files, filtered)
                if len(msgspec.json.encode((text, calls))) > MAX_ANSWER_BYTES:
                    reason = f"the answer has more than {MAX_ANSWER_BYTES} bytes as JSON"
                    raise Ended("failed", f"{self.agent.model}: {reason}", FAILED)
                completed = await self._complete(reply, turns)
                if completed is not None:
                    return completed
                continue
            misfits += 1
            if misfits == STRUCTURE_ATTEMPTS:
                raise Ended("failed", f"{self.agent.model}: the answer does not fit: {misfit}", FAILED)
            system = f"{instructions}\n\nYour last answer was refused: {misfit}."

    async def _complete(self, reply: Reply, turns: list[Turn]) -> ItemEnded | Reply | None:
        """Returns the result of `complete`, or None if messages came that the reply does not cover."""
        while True:
            try:
                return await self.complete(reply, self._messages)
            except MessagesArrived:
                shown = self._messages
                # Again at once if the messages were deleted.
                if await self._take_messages(turns) or self._messages == shown:
                    return None

    async def _summary(self, conversation: Conversation) -> SessionSummary | None:
        """A summary of the part that is too old to be shown; None if there is no such part or the model failed."""
        under_way = self.steps.next_digest() == SUMMARY
        if not under_way and not (conversation.older and not self.steps.next_has_begun()):
            return None
        before = [conversation.summary.text] if conversation.summary else []
        said = [f"{_SPEAKERS[type(turn)]}: {turn.text}" for exchange in conversation.older for turn in exchange.turns]
        transcript = "\n".join([*before, *said])[-SUMMARISED_CHARACTERS:]
        try:
            answer = await self.models.ask(Prompt(SUMMARISE, (UserTurn(transcript),)), SUMMARY)
        except Ended as error:
            if error.status != "failed":
                raise
            return None
        if not answer.text.strip():
            return None
        about = frozenset().union(*(exchange.about for exchange in conversation.older))
        seq = conversation.older[-1].seq if conversation.older else 0
        known_about = conversation.summary.about if conversation.summary else frozenset()
        return SessionSummary(answer.text, seq, about | known_about)

    async def _take_messages(self, turns: list[Turn]) -> bool:
        """Adds messages that came during the run, from the next step on. False if there are none.

        The journal keeps the place: a worker that resumes the run takes the same messages at the same step.
        """
        if not self.steps.next_has_begun():
            taken: Sequence[UserTurn] = ()
            if self.context.messages > self._messages:
                taken = await self.context.later_messages(self._messages)
            if taken:
                await self.steps.record_messages(self._messages + len(taken))
        else:
            known = messages_at(self.context.state, self.context.last_step + 1) - self._messages
            taken = (await self.context.later_messages(self._messages))[:known] if known else ()
        self._messages += len(taken)
        self._is_changed = self._is_changed or any(turn.text in ("", DELETED_TEXT) for turn in taken)
        if not self.steps.next_has_begun():
            # Deleted before a model was shown it: there is nothing to answer.
            taken = [turn for turn in taken if turn.text != DELETED_TEXT]
        text = "\n".join(turn.text for turn in taken if turn.text)
        images = tuple(image for turn in taken for image in turn.images)
        if not text and not images:
            return False
        step = self.context.last_step + 1
        if self._taken_before == step:
            # One turn for each step: a worker that resumes the run takes all messages of a step at once.
            earlier = turns.pop()
            assert isinstance(earlier, UserTurn)
            text, images = f"{earlier.text}\n{text}", earlier.images + images
        turns.append(UserTurn(text, images))
        self._taken_before = step
        return True

    async def _retrieve(self, text: str) -> tuple[Passage, ...]:
        async def call(_: str, attempt: int) -> tuple[tuple[Passage, ...], None]:
            request = memory_pb2.RetrieveRequest(
                query=text[:QUERY_CHARACTERS],
                types=["document", "memory"],
                agent_id=str(self.context.agent_id),
                subject_id=self.context.subject_id,
                session_key=self.context.session_key,
                channel_id=str(self.context.channel_id or ""),
                api_key_id=self.context.origin.api_key_id,
                member_id=str(self.context.origin.member_id or ""),
                tag=self.context.tag,
            )
            try:
                reply = await self.memory.Retrieve(request, metadata=self.context.metadata, timeout=RETRIEVE_SECONDS)
            except NotFound:
                return (), None
            return tuple(_passage(found) for found in reply.passages), None

        with telemetry.span("retrieval", SpanKind.CLIENT, attributes={"gen_ai.operation.name": "retrieval"}):
            try:
                spec = StepSpec("retrieve", "", self._digest(text))
                return await self.steps.make(spec, call, tuple[Passage, ...])
            except StepFailed as error:
                raise Ended("failed", f"retrieval: {error}", FAILED) from error

    def _digest(self, *parts: object) -> str:
        return "" if self._is_changed else digest(*parts)

    def _output_limit(self, callers: int | None) -> int | None:
        """The lower one of the caller's limit and of the rest of the run's."""
        most = self.context.limits.tokens
        limits = (callers, None if most is None else max(1, most - self.context.state.tokens))
        return min((limit for limit in limits if limit is not None), default=None)

    async def _misfit(
        self,
        answer: ModelAnswer,
        calls: tuple[ToolCall, ...],
        callers_tools: dict[str, Tool],
        schema: dict[str, Any] | None,
        *,
        must_call: bool,
    ) -> str | None:
        """Why the answer does not fit the schema or tools; None if it fits. Raises Ended if it is empty."""
        if not answer.text.strip() and not calls:
            raise Ended("failed", f"{self.agent.model}: the answer is empty", FAILED)
        if calls:
            for call in calls:
                tool = callers_tools[call.name]
                if tool.strict and (misfit := await _misfit_of_text(tool.schema, call.arguments, "arguments")):
                    return f"invalid arguments for {tool.name}: {misfit}"
            return None
        if must_call:
            return "no tool was called"
        return None if schema is None else await _misfit_of_text(schema, answer.text, "answer")


async def _misfit_of_text(schema: dict[str, Any], text: str, name: str) -> str | None:
    """Why the text does not fit the schema; None if it fits."""
    try:
        # In a thread, as a schema may ask for much work.
        await asyncio.to_thread(check, name, schema, msgspec.json.decode(text))
    except msgspec.DecodeError:
        return "not JSON"
    except InvalidMessage as error:
        return str(error)
    return None


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
