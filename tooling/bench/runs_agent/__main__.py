"""The real agent service with a model, tools and billing that answer immediately in this process.

The rest of a run's cost is durability. The model asks for a tool twice and then answers, so each run has five steps:
model, tool, model, tool, model.
"""

from __future__ import annotations

from typing import Any, cast

from infra.service.service import Runtime
from infra.stores.cache import Cache
from protos.plugin.v1 import plugin_pb2
from services.agent import adapters
from services.agent.__main__ import service
from services.agent.execution import wiring
from services.agent.execution.context import Services
from services.agent.execution.executor import Executor
from services.agent.models.contract import ModelAnswer, ModelEndpoint, OnText, Prompt, ToolCall, ToolTurn, Usage
from services.agent.models.library import Models
from tooling.bench.runs_agent import TOOL
from tooling.testing.service_fakes import HasCredit

TOOL_CALLS = 2
REPLY = "The bench's own answer: no model was asked."
_USAGE = Usage(input_tokens=100, cached_tokens=0, output_tokens=10, reasoning_tokens=0)
_TOOL = plugin_pb2.Tool(name=TOOL, description="Works out a sum.", schema_json='{"type": "object"}')


class AtOnce(Models):
    """The only model, under every name."""

    def __init__(self) -> None:
        pass

    def model(self, name: str, endpoint: ModelEndpoint) -> AtOnce:
        return self

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        called = sum(isinstance(turn, ToolTurn) for turn in prompt.turns)
        if called < TOOL_CALLS:
            call = ToolCall(f"call_{called}", TOOL, '{"expression": "1 + 1"}')
            return ModelAnswer("", (call,), _USAGE, "at-once", "tool_call")
        await on_text(REPLY)
        return ModelAnswer(REPLY, (), _USAGE, "at-once", "stop")


class Tools:
    """Stands in for the plugin service's stub."""

    async def Tools(self, request: plugin_pb2.ToolsRequest, **_: Any) -> plugin_pb2.ToolsReply:
        return plugin_pb2.ToolsReply(tools=[_TOOL])

    async def Call(self, request: plugin_pb2.CallRequest, **_: Any) -> plugin_pb2.CallReply:
        return plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_SUCCEEDED, result_json='{"result": 2}')


def executor(runtime: Runtime) -> Executor:
    """The service's own executor with models and services that answer at once."""
    services = Services(adapters.memory(runtime), cast(Any, HasCredit()), cast(Any, Tools()), Cache(runtime.cache))
    return wiring.executor_with(runtime, AtOnce(), services)


service.works = [
    (work, {**given, "executor": executor} if "executor" in given else given) for work, given in service.works
]

if __name__ == "__main__":
    service.run()
