"""Tools of a run: the plugin service's tools and other agents, which are called in the same way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from infra.errors import EffectFailed, NotFound
from infra.observe import telemetry
from protos.messages.channel import ASKER
from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from services.agent.definitions.models import Colleague, NewAgent
from services.agent.execution.children import MAX_DEPTH, QUESTION, Question
from services.agent.execution.context import RunContext
from services.agent.execution.credit import RunCredit
from services.agent.execution.files import RunFiles
from services.agent.execution.outcome import ChildRun, Ended, Suspended
from services.agent.execution.steps import StepFailed, Steps, StepSpec, digest
from services.agent.models.contract import Tool, ToolCall, ToolTurn
from services.agent.runs.content import StoredFile, ToolResult
from services.agent.runs.domain import Suspend
from services.agent.runs.notices import UNCERTAIN

ATTEMPTS = 3
TIMEOUT_SECONDS = 60.0
# The tools that act on the memories of the person who speaks. Only an agent that gets memories has them.
OF_MEMORIES = frozenset(("memories_list", "memories_correct", "memories_forget"))
# A longer result is cut before the model reads it.
RESULT_CHARACTERS = 50_000


@dataclass(frozen=True)
class Tools:
    """Offers the agent's tools to the model and makes the calls that the model asks for."""

    context: RunContext
    agent: NewAgent
    steps: Steps
    credit: RunCredit
    plugin: plugin_pb2_grpc.PluginStub
    files: RunFiles

    async def offered(self) -> tuple[Tool, ...]:
        """The agent's tools that work now. Each attempt of the run asks again; the journal does not depend on it."""
        agents = tuple(Tool(other.name, other.description, QUESTION) for other in self.agent.agents)
        names = self._names()
        if not names:
            return agents
        request = plugin_pb2.ToolsRequest(names=names)
        reply = await self.plugin.Tools(request, metadata=self.context.metadata)
        tools = (Tool(tool.name, tool.description, msgspec.json.decode(tool.schema_json)) for tool in reply.tools)
        return (*tools, *agents)

    async def call_all(self, calls: Sequence[ToolCall]) -> list[ToolTurn]:
        """Makes the calls at the same time and returns their results in order.

        Raises Suspended before the first call if a person has to approve one of them.
        """
        denied = set()
        for n, call in enumerate(calls, 1):
            if call.name in self.agent.approval:
                decision = self.steps.decision_on_next(n)
                # A fork has the calls of its origin without the decisions about them.
                if decision is None and not self.steps.has_ended(n):
                    approvers = self.context.approvers or self.agent.approvers
                    raise self.steps.ask_for_approval(n, call.name, call.arguments, of_asker=ASKER in approvers)
                if decision == "deny":
                    denied.add(n)
        agent_calls = sum(self._agent_named(call.name) is not None for call in calls)
        # Each coroutine takes its step number at its first turn, so the order of this list is the order of the steps.
        made = [self._deny(call) if n in denied else self._call(call, agent_calls) for n, call in enumerate(calls, 1)]
        if len(made) == 1:
            return [ToolTurn(calls[0], await made[0])]
        # All calls run to their end: an error in one must not leave the effect of another one unrecorded.
        results = await asyncio.gather(*made, return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        if waits := [error for error in errors if isinstance(error, Suspended)]:
            # The run waits for the first child. The other children start now, too.
            waits[0].children = [child for each in waits for child in each.children]
        for kind in (asyncio.CancelledError, Ended, Suspended, BaseException):
            for error in errors:
                if isinstance(error, kind):
                    raise error
        return [ToolTurn(call, str(result)) for call, result in zip(calls, results, strict=True)]

    async def refuse_all(self, calls: Sequence[ToolCall], reason: str) -> list[ToolTurn]:
        """Makes none of the calls. The model reads the reason, and the steps show it."""
        for call in calls:
            await self.steps.refuse(_spec(call), reason)
        return [ToolTurn(call, f"Error: {reason}") for call in calls]

    async def _deny(self, call: ToolCall) -> str:
        await self.steps.refuse(_spec(call), "a person has refused this call")
        return "Error: a person has refused this call"

    async def _call(self, call: ToolCall, agent_calls: int) -> str:
        """The text that the model reads: the tool's result or its error.

        `agent_calls`: how many of the calls that are made together go to other agents.
        """
        if other := self._agent_named(call.name):
            return await self._ask_agent(call, other, agent_calls)
        n = self.context.last_step + 1

        async def send(idempotency_key: str, _: int) -> tuple[ToolResult, None]:
            if call.name not in self._names():
                # Also if the tenant has the tool: the agent's definition decides which tools it may use.
                raise NotFound(f"there is no tool {call.name}")
            hold_id = await self.credit.reserve_tool(n, call.name)
            request = plugin_pb2.CallRequest(
                tool=call.name,
                arguments_json=call.arguments or "{}",
                idempotency_key=idempotency_key,
                agent_id=str(self.context.agent_id),
                subject_id=self.context.subject_id,
                speaker_id=await self.context.speaker() if call.name in OF_MEMORIES else "",
                hold_id=str(hold_id),
                channel_id=str(self.context.channel_id or ""),
                session_key=self.context.session_key,
                api_key_id=self.context.origin.api_key_id,
                member_id=str(self.context.origin.member_id or ""),
                run_id=str(self.context.run_id),
                tag=self.context.tag,
            )
            reply = await self.plugin.Call(request, metadata=self.context.metadata, timeout=TIMEOUT_SECONDS)
            return await self._with_files(n, _result(reply), reply.files), None

        attributes: dict[str, telemetry.Value] = {
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": call.name,
            "gen_ai.tool.call.id": call.id,
        }
        with telemetry.span(f"execute_tool {call.name}", attributes=attributes):
            try:
                returned = await self.steps.make(_spec(call), send, ToolResult)
            except StepFailed as error:
                return f"Error: {error}"
            if returned.unknown is not None:
                text = f"{call.name}: {returned.unknown}"
                suspend = Suspend(self.context.session_key, "indeterminate", n, call.name, text)
                raise Suspended(suspend, UNCERTAIN)
            self.files.add(n, returned.files)
            return returned.result

    async def _with_files(self, step: int, result: ToolResult, files: Sequence[plugin_pb2.File]) -> ToolResult:
        """The result with its files stored, and with a line for the model about each of them."""
        stored, lost = [], []
        for n, file in enumerate(files, 1):
            kept = await self.files.keep(step, n, file.name, file.content)
            if isinstance(kept, StoredFile):
                stored.append(kept)
            else:
                lost.append(f"[{file.name} is not sent to the person: {kept}.]")
        text = "\n".join([result.result, *_sent_after(stored), *lost])
        return msgspec.structs.replace(result, result=text, files=tuple(stored))

    async def _ask_agent(self, call: ToolCall, other: Colleague, agent_calls: int) -> str:
        context, spec = self.context, _spec(call)
        n = context.last_step + 1
        try:
            question = msgspec.json.decode(call.arguments, type=Question).message
        except msgspec.DecodeError as error:
            await self.steps.refuse(spec, f"arguments: {error}")
            return f"Error: arguments: {error}"
        if context.depth >= MAX_DEPTH:
            reason = "agents have asked each other too often"
            await self.steps.refuse(spec, reason)
            return f"Error: {reason}"
        try:
            if (known := await self.steps.begin_for_child(spec)) is not None:
                self.files.add(n, known.files)
                return known.result
        except StepFailed as error:
            return f"Error: {error}"
        child = await context.child(n)
        if child and child.is_over:
            if child.reply is None:
                await self.steps.end_for_child(n, None, child.error)
                return f"Error: {child.error}"
            # Without images in base64, which would fill the model's window.
            reply, files = await self.files.taken_out(n, child.reply)
            of_child = await context.files_of_child(n)
            result = ToolResult("\n".join([_cut(reply), *_sent_after(of_child)]), files=(*of_child, *files))
            await self.steps.end_for_child(n, result, None)
            self.files.add(n, result.files)
            return result.result
        text = f"step {n}: waits for the agent {other.name}"
        suspend = Suspend(context.session_key, "agent", n, other.name, text)
        if child:
            raise Suspended(suspend, None)
        limit = context.limits.nanos
        # The children together must not spend more than this run has left.
        left = None if limit is None else max(0, limit - await self.credit.spent()) // agent_calls
        raise Suspended(suspend, None, [ChildRun(n, other.agent_id, question, left)])

    def _names(self) -> list[str]:
        """The names of the plugin service's tools that the agent may use."""
        return [name for name in self.agent.tools if self.agent.knowledge or name not in OF_MEMORIES]

    def _agent_named(self, name: str) -> Colleague | None:
        return next((other for other in self.agent.agents if other.name == name), None)


def _spec(call: ToolCall) -> StepSpec:
    return StepSpec("tool", call.name, digest(call.name, call.arguments), ATTEMPTS)


def _sent_after(files: Sequence[StoredFile]) -> list[str]:
    """For the model, about files that a step has for the person."""
    return [f"[{file.name} is sent to the person after your answer.]" for file in files]


def _result(reply: plugin_pb2.CallReply) -> ToolResult:
    """Raises EffectFailed if the tool failed."""
    match reply.outcome:
        case plugin_pb2.CallReply.OUTCOME_SUCCEEDED:
            return ToolResult(_cut(reply.result_json))
        case plugin_pb2.CallReply.OUTCOME_UNKNOWN:
            return ToolResult("", unknown=reply.error or "it is not known whether the call took effect")
        case _:
            raise EffectFailed(reply.error or "the tool failed")


def _cut(result: str) -> str:
    return result if len(result) <= RESULT_CHARACTERS else f"{result[:RESULT_CHARACTERS]}… (cut off)"
