"""The spans of a run, by the semantic conventions for generative AI, in the trace of the message."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from tests.services.agent.conftest import MODEL, World
from tooling.testing.model_server import Says
from tooling.testing.otlp import OtlpReceiver, ReceivedSpan
from tooling.testing.service_fakes import WEATHER

WANTED = ("invoke_agent Helper", "retrieval", f"chat {MODEL}", f"execute_tool {WEATHER}")


async def test_a_run_is_one_story_in_one_trace(world: World) -> None:
    platform = world.platform
    async with OtlpReceiver() as receiver:
        await asyncio.to_thread(platform.stop, "agent")
        await platform.start("agent", OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint)
        tenant = world.tenant()
        agent = await tenant.agent(tools=[WEATHER], knowledge=True)
        answer = Says("Rain.", usage=(100, 60, 9, 4))
        world.models.script(MODEL, Says(calls=((WEATHER, '{"city":"Bern"}'),)), answer)
        run = await tenant.over(await tenant.say(agent, "Weather?"))

        def complete(spans: Sequence[ReceivedSpan]) -> bool:
            names = [span.name for span in spans if span.trace_id == run["trace_id"]]
            return all(name in names for name in WANTED) and names.count(f"chat {MODEL}") == 2

        await receiver.wait_for(complete, 20)
        spans = {span.name: span for span in receiver.spans if span.trace_id == run["trace_id"]}
        items = (await tenant.call("GET", f"/api/v1/runs/{run['id']}/timeline"))["items"]
        await asyncio.to_thread(platform.stop, "agent")
    invoke = spans["invoke_agent Helper"]
    for name in WANTED[1:]:
        assert spans[name].parent_id == invoke.span_id
    assert invoke.attributes["gen_ai.agent.id"] == agent
    chat = spans[f"chat {MODEL}"]
    assert chat.kind == "client"
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 60,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.reasoning.output_tokens": 4,
    }
    assert {name: chat.attributes.get(name) for name in expected} == expected
    assert {item["span_id"] for item in items if item["kind"] == "model"} <= {
        span.span_id for span in receiver.spans if span.name == f"chat {MODEL}"
    }
