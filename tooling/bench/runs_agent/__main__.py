"""The real agent service, but whom its runs would wait for answers at once and in this process: what is left of a run
is what makes it durable.

No model, no tool and no credit is behind the answers. The model asks for a tool twice and then has its say, so each run
has five steps: model, tool, model, tool, model.
"""

from __future__ import annotations

from typing import Any, cast

from infra.service.service import Runtime
from infra.stores.cache import Cache
from protos.billing.v1 import billing_pb2
from protos.plugin.v1 import plugin_pb2
from services.agent import adapters
from services.agent.__main__ import service
from services.agent.execution import wiring
from services.agent.execution.context import Services
from services.agent.execution.executor import Executor
from services.agent.models.contract import Answer, Endpoint, OnText, Prompt, Returned, ToolCall, Usage
from services.agent.models.library import Models
from tooling.bench.runs_agent import TOOL

TOOL_CALLS = 2
REPLY = "The bench's own answer: no model was asked."
_USAGE = Usage(input_tokens=100, cached_tokens=0, output_tokens=10, reasoning_tokens=0)
_TOOL = plugin_pb2.Tool(name=TOOL, description="Works out a sum.", schema_json='{"type": "object"}')


class AtOnce(Models):
    """The one model, by whatever name it is asked for."""

    def __init__(self) -> None:
        pass

    def model(self, name: str, endpoint: Endpoint) -> AtOnce:
        return self

    async def answer(self, prompt: Prompt, on_text: OnText) -> Answer:
        called = sum(isinstance(turn, Returned) for turn in prompt.turns)
        if called < TOOL_CALLS:
            call = ToolCall(f"call_{called}", TOOL, '{"expression": "1 + 1"}')
            return Answer("", (call,), _USAGE, "at-once", "tool_call")
        await on_text(REPLY)
        return Answer(REPLY, (), _USAGE, "at-once", "stop")


class Credit:
    """Billing, as its stub is called."""

    async def Reserve(self, request: billing_pb2.ReserveRequest, **_: Any) -> billing_pb2.ReserveReply:
        return billing_pb2.ReserveReply(granted=True, held_nanos=1, currency="USD")


class Tools:
    """The plugin service, as its stub is called."""

    async def Tools(self, request: plugin_pb2.ToolsRequest, **_: Any) -> plugin_pb2.ToolsReply:
        return plugin_pb2.ToolsReply(tools=[_TOOL])

    async def Call(self, request: plugin_pb2.CallRequest, **_: Any) -> plugin_pb2.CallReply:
        return plugin_pb2.CallReply(outcome=plugin_pb2.CallReply.OUTCOME_SUCCEEDED, result_json='{"result": 2}')


def executor(runtime: Runtime) -> Executor:
    """The service's own executor with models and services that answer at once."""
    services = Services(adapters.memory(runtime), cast(Any, Credit()), cast(Any, Tools()), Cache(runtime.cache))
    return wiring.executor_with(runtime, AtOnce(), services)


service.works = [
    (work, {**given, "executor": executor} if "executor" in given else given) for work, given in service.works
]

if __name__ == "__main__":
    service.run()
