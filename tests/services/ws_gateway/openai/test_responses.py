"""Responses by the real process, judged by OpenAI's own client and by pydantic-ai."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from infra.clock import uuid7
from protos.messages.agent import RunCompleted, ToolCall
from tests.services.ws_gateway.agent import SESSION
from tests.services.ws_gateway.openai.conftest import WAIT_SECONDS, Hearing, World
from tests.services.ws_gateway.openai.test_chat import CALLS, answering


class Reading(Hearing):
    """A stream that the client's own helper reads in the background."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.final: Any = None
        self.text = ""

    async def read(self, client: AsyncOpenAI, model: str) -> None:
        async with client.responses.stream(model=model, input="Hi") as stream:
            async for event in stream:
                self.events.append(event)
                self.text += event.delta if event.type == "response.output_text.delta" else ""
            if self.events[-1].type == "response.completed":
                self.final = await stream.get_final_response()

    async def has(self, text: str) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.text != text:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("reason", ["max_output_tokens", "content_filter"])
async def test_a_response_that_was_cut_off_is_incomplete(
    world: World, client: AsyncOpenAI, model: str, reason: str
) -> None:
    filtered = reason == "content_filter"
    async with answering(client.responses.create(model=model, input="Hi")) as answer:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await run.replies("half a", finish_reason="length", filtered=filtered)
        found = await answer
    assert (found.status, found.output_text) == ("incomplete", "half a")
    assert found.incomplete_details
    assert found.incomplete_details.reason == reason
    reading = Reading()
    async with answering(reading.read(client, model)) as done:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await run.replies("half a", finish_reason="length", filtered=filtered)
        await done
    last = reading.events[-1]
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")
    assert last.response.incomplete_details.reason == reason


async def test_a_response_has_the_reply(world: World, client: AsyncOpenAI, model: str) -> None:
    asked = client.responses.create(model=model, input="Hi", instructions="Be brief.", store=True)
    async with answering(asked) as answer:
        run = await world.run()
        assert run.asked.body == {"text": "Hi", "history": [], "system": "Be brief."}
        await run.answers("Good day", input_tokens=100, cached_tokens=60, output_tokens=9)
        found = await answer
    assert (found.id, found.status, found.model, found.output_text) == (
        f"resp_{run.id}",
        "completed",
        model,
        "Good day",
    )
    assert found.usage
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (100, 9, 109)
    assert found.usage.input_tokens_details.cached_tokens == 60
    # The output of one response is the input of the next.
    both: Any = [{"role": "user", "content": "Hi"}, *found.output, {"role": "user", "content": "Bye"}]
    asked = client.responses.create(model=model, input=both)
    async with answering(asked) as answer:
        run = await world.run()
        assert run.asked.body["history"] == [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Good day"}]
        # Cached tokens are not reported; the client's type requires all parts.
        await run.answers("Bye", input_tokens=12, cached_tokens=None, output_tokens=5)
        Response.model_validate((await answer).to_dict(), strict=True)


async def test_a_stream_is_told_by_the_clients_own_helper(world: World, client: AsyncOpenAI, model: str) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Let me see.")
        await run.step_ends(1)
        await run.step(2, kind="tool")
        await run.step(3)
        await run.writes(1, "It is", step=3)
        await reading.has("Let me see.It is")
        world.agent.usage[run.id] = {"input_tokens": 12, "cached_tokens": 0, "output_tokens": 5}
        await run.replies("It is wet.")
        await read
    item = [
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    names = ["response.created", "response.in_progress", *item, *item[:3], *item[2:], "response.completed"]
    assert [event.type for event in reading.events] == names
    assert [event.sequence_number for event in reading.events] == list(range(len(names)))
    assert [message.content[0].text for message in reading.final.output] == ["Let me see.", "It is wet."]
    assert len({message.id for message in reading.final.output}) == 2
    assert (reading.final.id, reading.final.status, reading.final.usage.output_tokens) == (
        f"resp_{run.id}",
        "completed",
        5,
    )


async def test_calls_of_the_clients_functions_are_items(world: World, client: AsyncOpenAI, model: str) -> None:
    tools: Any = [{"type": "function", "name": "time", "parameters": None, "strict": None}]
    for text in ("", "Let me see."):
        asked = client.responses.create(
            model=model, input="Hi", tools=tools, tool_choice="required", parallel_tool_calls=False
        )
        async with answering(asked) as answer:
            run = await world.run()
            await run.begins()
            await run.replies(text, *CALLS)
            found = await answer
        items = [item.type for item in found.output]
        assert (items, found.output_text) == (["message"] * bool(text) + ["function_call"] * 2, text)
        assert [(item.call_id, item.name, item.arguments) for item in found.output if item.type == "function_call"] == [
            (call.id, call.name, call.arguments) for call in CALLS
        ]
        assert (found.tools[0].type, found.tool_choice, found.parallel_tool_calls) == ("function", "required", False)


async def test_references_to_items_are_the_items_of_earlier_answers(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    """As the AI SDK of Vercel sends them by default."""
    async with answering(client.responses.create(model=model, input="Hi")) as answer:
        run = await world.run()
        await run.begins()
        await run.replies("Let me see.", *CALLS)
        output = (await answer).output
    message, *calls = ({"type": "item_reference", "id": str(item.id)} for item in output)
    before = {"type": "item_reference", "id": f"msg_{run.id}_7"}
    results = [{"type": "function_call_output", "call_id": call.id, "output": "Bern"} for call in CALLS]
    input_: Any = [{"role": "user", "content": "Hi"}, before, message, *calls, *results]
    async with answering(client.responses.create(model=model, input=input_)) as answer:
        later = await world.run()
        await later.answers("Bern")
        await answer
    told = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in CALLS]
    assert later.asked.body["since"] == [
        {"role": "assistant", "text": "Let me see.", "calls": told},
        *({"role": "tool", "text": "Bern", "call": call} for call in told),
    ]
    # Of another tenant, of no run, of no call, and of a run without a reply.
    others, open_ = world.agent.new_run("other"), world.agent.new_run("acme")
    for id_ in (f"msg_{others}_0", f"msg_{uuid7()}_0", f"fc_{run.id}_2", f"msg_{open_}_0"):
        unknown: Any = [{"role": "user", "content": "Hi"}, {"type": "item_reference", "id": id_}]
        with pytest.raises(openai.BadRequestError, match="store: false") as refused:
            await client.responses.create(model=model, input=unknown)
        assert refused.value.param == "input[1].id"


async def test_a_request_refers_to_100_answers_at_most(world: World, client: AsyncOpenAI, model: str) -> None:
    """The agent is not asked for any of them."""
    before = world.agent.reads
    runs = [uuid7() for _ in range(101)]
    items = [{"type": "item_reference", "id": f"{kind}_{run}_0"} for run in runs for kind in ("msg", "fc")]
    input_: Any = [{"role": "user", "content": "Hi"}, *items]
    with pytest.raises(openai.BadRequestError, match="store: false") as refused:
        await client.responses.create(model=model, input=input_)
    assert (refused.value.param, world.agent.reads) == ("input[201].id", before)


async def test_a_request_repeats_4_mib_of_earlier_answers_at_most(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    """With references, a few bytes of a request would stand for a hundred thousand."""
    run_id = world.agent.new_run("acme")
    call = ToolCall(id="c", name="find", arguments="x" * 100_000)
    world.agent.committed[run_id] = [
        RunCompleted(run_id=run_id, session_key=SESSION, reply="", tool_calls=(call,), n=1)
    ]
    pair = [
        {"type": "item_reference", "id": f"fc_{run_id}_0"},
        {"type": "function_call_output", "call_id": "c", "output": "Bern"},
    ]
    input_: Any = [{"role": "user", "content": "Hi"}, *pair * 50]
    with pytest.raises(openai.BadRequestError, match="too many characters") as refused:
        await client.responses.create(model=model, input=input_)
    # The answer itself counts once, and each item that stands for a reference.
    assert refused.value.param == "input[81].id"


async def test_a_stream_ends_with_the_calls(world: World, client: AsyncOpenAI, model: str) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Let me")
        await run.replies("Let me see.", *CALLS)
        await read
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    names = [f"response.{name}" for name in ["output_item.done", *call, *call, "completed"]]
    assert [event.type for event in reading.events][-len(names) :] == names
    assert [event.sequence_number for event in reading.events] == list(range(len(reading.events)))
    assert [event.output_index for event in reading.events if event.type == "response.output_item.done"] == [0, 1, 2]
    message, *calls = reading.final.output
    assert (message.content[0].text, [item.call_id for item in calls]) == ("Let me see.", ["call_1", "call_2"])
    assert [item.arguments for item in calls] == [call.arguments for call in CALLS]
    assert len({item.id for item in reading.final.output}) == 3


async def test_a_stream_whose_text_is_taken_back_has_failed(world: World, client: AsyncOpenAI, model: str) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Good")
        await run.step(1, attempt=2)
        await read
    last = reading.events[-1]
    assert (reading.text, last.type, last.response.status) == ("Good", "response.failed", "failed")
    assert (last.response.error.code, last.response.id) == ("server_error", f"resp_{run.id}")


async def test_a_run_without_credit_is_an_error_with_its_status(world: World, client: AsyncOpenAI, model: str) -> None:
    async with answering(client.responses.create(model=model, input="Hi", stream=True)) as answer:
        await (await world.run()).fails("refused")
        with pytest.raises(openai.RateLimitError) as refused:
            await answer
    assert refused.value.code == "insufficient_quota"


async def test_what_cannot_be_taken_is_named(world: World, client: AsyncOpenAI, model: str, nobody: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(model=model, input="Hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError) as missing:
        await client.responses.create(model=nobody, input="Hi")
    assert missing.value.code == "model_not_found"
    assert world.agent.completions.empty()


async def test_pydantic_ai_talks_to_an_agent_as_to_any_model(world: World, client: AsyncOpenAI, model: str) -> None:
    agent = Agent(OpenAIResponsesModel(model, provider=OpenAIProvider(openai_client=client)), instructions="Be brief.")
    async with answering(agent.run("Hi")) as answer:
        run = await world.run()
        assert (run.asked.body["text"], run.asked.body["system"]) == ("Hi", "Be brief.")
        await run.answers("Good day", input_tokens=12, cached_tokens=2, output_tokens=5)
        first = await answer
    assert (first.output, first.usage.input_tokens, first.usage.output_tokens) == ("Good day", 12, 5)

    async def again() -> str:
        async with agent.run_stream("And now?", message_history=first.all_messages()) as stream:
            return "".join([text async for text in stream.stream_text(delta=True)])

    async with answering(again()) as told:
        run = await world.run()
        assert run.asked.body["history"] == [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Good day"}]
        await run.answers("Good night")
        assert await told == "Good night"
