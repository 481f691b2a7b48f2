"""OpenAI's own client and pydantic-ai against the real gateway and the real agent; only the model is a stand-in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.services.agent.conftest import MODEL, Tenant, World, running_agent
from tests.services.ws_gateway.openai.conftest import WAIT_SECONDS
from tooling.testing.model_server import Says, Streams
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import WEATHER

HI: Any = [{"role": "user", "content": "Hi"}]
FITS = '{"name":"Bern","people":146348}'


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(scope="module")
async def world(platform: Platform) -> AsyncIterator[World]:
    async with running_agent(platform, "ws_gateway", CLAW_LOG_LEVEL="debug") as world:
        yield world


@pytest.fixture
def tenant(world: World) -> Tenant:
    return world.tenant()


@pytest.fixture
async def client(world: World, tenant: Tenant) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"{world.platform.url('ws_gateway')}/v1",
        api_key="what the proxy in front looks at",
        default_headers=world.platform.headers(tenant.id),
        http_client=httpx2.AsyncClient(trust_env=False, timeout=WAIT_SECONDS),
    ) as client:
        yield client


def both(client: AsyncOpenAI, model: str) -> list[Model]:
    """An agent as pydantic-ai's models."""
    provider = OpenAIProvider(openai_client=client)
    return [OpenAIChatModel(model, provider=provider), OpenAIResponsesModel(model, provider=provider)]


@asynccontextmanager
async def heard(world: World, tenant: Tenant, gate: asyncio.Event) -> AsyncIterator[None]:
    """The stream of the block gets all deltas after the gate, which opens when the stream listens."""

    async def listens() -> bool:
        runs = (await tenant.call("GET", "/api/v1/runs", params={"status": "running"}))["items"]
        # The gateway listens before it reads.
        return any(f"/internal/runs/{run['id']}/events" in world.platform.log("agent") for run in runs)

    async def open_() -> None:
        await world.platform.until(listens)
        gate.set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(open_())
        yield


async def test_a_completion_is_parsed_into_the_clients_own_class(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("Bern."), Says(FITS))
    found = await client.chat.completions.parse(model=agent, messages=HI, response_format=City)
    assert found.choices[0].message.parsed == City(name="Bern", people=146348)
    world.models.script(MODEL, Says("Bern."), Says(FITS))
    answer = await client.responses.parse(model=agent, input="Hi", text_format=City)
    assert answer.output_parsed == City(name="Bern", people=146348)


async def test_a_stream_has_nothing_but_the_answer_that_fits(world: World, tenant: Tenant, client: AsyncOpenAI) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    for own in (None, City.model_json_schema()):
        await tenant.call("PATCH", f"/api/v1/agents/{agent}", json={"output_schema": own})
        format_: Any = openai.omit if own else City
        gate = asyncio.Event()
        call = Says("Let me see.", calls=((WEATHER, '{"city":"Bern"}'),), waits=gate)
        world.models.script(MODEL, call, Says('{"name":"Bern"}'), Says(FITS))
        async with (
            heard(world, tenant, gate),
            client.chat.completions.stream(model=agent, messages=HI, response_format=format_) as stream,
        ):
            found = (await stream.get_final_completion()).choices[0].message
        assert (found.content, found.parsed) == (FITS, None if own else City(name="Bern", people=146348))


async def test_any_object_is_asked_for(world: World, tenant: Tenant, client: AsyncOpenAI) -> None:
    agent = await tenant.agent()
    world.models.script(MODEL, Says("[1]"), Says('{"a":1}'))
    found = await client.chat.completions.create(model=agent, messages=HI, response_format={"type": "json_object"})
    assert found.choices[0].message.content == '{"a":1}'
    world.models.script(MODEL, Says("[1]"), Says('{"a":2}'))
    answer = await client.responses.create(model=agent, input="Hi", text={"format": {"type": "json_object"}})
    assert (answer.output_text, answer.text and answer.text.format and answer.text.format.type) == (
        '{"a":2}',
        "json_object",
    )


async def test_pydantic_ai_has_its_class_by_the_format(world: World, tenant: Tenant, client: AsyncOpenAI) -> None:
    for model in both(client, await tenant.agent()):
        agent = Agent(model, output_type=NativeOutput(City))
        world.models.script(MODEL, Says("Bern."), Says(FITS))
        assert (await agent.run("Hi")).output == City(name="Bern", people=146348)
        world.models.script(MODEL, Says('{"name":"Bern"}'), Says(FITS))
        async with agent.run_stream("Hi") as stream:
            assert await stream.get_output() == City(name="Bern", people=146348)


class Where(BaseModel):
    """Returns the place of the person."""

    city: str


async def test_the_clients_tool_is_called_and_the_conversation_goes_on(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    tools = [openai.pydantic_function_tool(Where)]
    bern = '{"city":"Bern"}'
    world.models.script(MODEL, Says(calls=(("Where", "{}"),)), Says("Let me see.", calls=(("Where", bern),)))
    first = (await client.chat.completions.parse(model=agent, messages=HI, tools=tools)).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.tool_calls
    [call] = first.message.tool_calls
    assert call.function.parsed_arguments == Where(city="Bern")
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "Here."}
    world.models.script(MODEL, Says(calls=((WEATHER, bern),)), Says("Wet."))
    messages: Any = [*HI, first.message, result]
    async with client.chat.completions.stream(model=agent, messages=messages, tools=tools) as stream:
        second = (await stream.get_final_completion()).choices[0]
    assert (second.message.content, second.finish_reason) == ("Wet.", "stop")
    told = world.models.requests[-1].body["messages"][-5:]
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "assistant", "tool"]
    assert (told[1]["content"], told[1]["tool_calls"][0]["function"], told[2]["content"]) == (
        "Let me see.",
        {"name": "Where", "arguments": bern},
        "Here.",
    )


async def test_a_response_calls_the_clients_function_and_goes_on(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    parameters = Where.model_json_schema()
    tools: Any = [{"type": "function", "name": "Where", "parameters": parameters, "strict": False}]
    bern = '{"city":"Bern"}'
    world.models.script(MODEL, Says("Let me see.", calls=(("Where", bern), ("Where", bern))))
    first = await client.responses.create(model=agent, input="Hi", tools=tools)
    said, *called = first.output
    assert said.type == "message"
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "Here."}
        for call in called
        if call.type == "function_call"
    ]
    world.models.script(MODEL, Says("Wet."))
    input_: Any = [*HI, *first.output, *results]
    async with client.responses.stream(model=agent, input=input_, tools=tools) as stream:
        assert (await stream.get_final_response()).output_text == "Wet."
    told = world.models.requests[-1].body["messages"][-4:]
    assert [message["role"] for message in told] == ["user", "assistant", "tool", "tool"]
    assert (told[1]["content"], len(told[1]["tool_calls"]), told[3]["content"]) == ("Let me see.", 2, "Here.")


async def test_of_a_stream_that_must_call_a_tool_no_refused_text_is_told(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent, gate = await tenant.agent(), asyncio.Event()
    world.models.script(MODEL, Says("No.", waits=gate), Says("Well.", calls=(("Where", '{"city":"Bern"}'),)))
    tools = [openai.pydantic_function_tool(Where)]
    async with (
        heard(world, tenant, gate),
        client.chat.completions.stream(model=agent, messages=HI, tools=tools, tool_choice="required") as stream,
    ):
        found = (await stream.get_final_completion()).choices[0].message
    assert (found.content, len(found.tool_calls or ())) == ("Well.", 1)


async def test_a_tool_that_is_called_as_one_of_the_agents_is_refused(tenant: Tenant, client: AsyncOpenAI) -> None:
    agent = await tenant.agent(tools=[WEATHER])
    tool: Any = {"type": "function", "function": {"name": WEATHER}}
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=agent, messages=HI, tools=[tool])
    assert (refused.value.param, WEATHER in refused.value.message) == ("tools", True)
    assert (await tenant.call("GET", "/api/v1/runs"))["items"] == []


async def test_pydantic_ai_has_its_class_by_a_tool(world: World, tenant: Tenant, client: AsyncOpenAI) -> None:
    for model in both(client, await tenant.agent(tools=[WEATHER])):
        agent = Agent(model, output_type=City)
        weather, answer = (WEATHER, '{"city":"Bern"}'), ("final_result", FITS)
        # An answer without a call makes the agent ask the model again.
        world.models.script(MODEL, Says("Bern."), Says(calls=(weather,)), Says("Well.", calls=(answer,)))
        first = await agent.run("Hi")
        assert first.output == City(name="Bern", people=146348)
        assert world.models.requests[-1].body["tool_choice"] == "required"
        world.models.script(MODEL, Says(calls=(weather, answer)))
        async with agent.run_stream("Again", message_history=first.all_messages()) as stream:
            assert await stream.get_output() == first.output
        roles = [message["role"] for message in world.models.requests[-1].body["messages"]]
        assert roles[-4:] == ["user", "assistant", "tool", "user"]


async def test_pydantic_ai_uses_a_tool_of_its_own(world: World, tenant: Tenant, client: AsyncOpenAI) -> None:
    for model in both(client, await tenant.agent(tools=[WEATHER])):
        agent = Agent(model)
        asked: list[str] = []

        @agent.tool_plain
        def place(of: str) -> str:
            """Returns the place of a person."""
            asked.append(of)  # noqa: B023
            return f"{of} in Bern"

        call, weather = ("place", '{"of":"me"}'), (WEATHER, '{"city":"Bern"}')
        script = Says(calls=(weather,)), Says("Wet.")
        world.models.script(MODEL, Says("Let me see.", calls=(call, call)), *script)
        first = await agent.run("Weather?")
        assert (first.output, asked) == ("Wet.", ["me", "me"])
        # With this model, text in front would be the result.
        world.models.script(MODEL, Says(calls=(call, call)), *script)
        async with agent.run_stream("And now?", message_history=first.all_messages()) as stream:
            assert await stream.get_output() == "Wet."
        assert asked == ["me"] * 4
        told = world.models.requests[-1].body["messages"]
        assert [message["content"] for message in told if message["role"] == "tool"][:2] == ["me in Bern"] * 2


async def test_functions_as_they_were_before_there_were_tools(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent, bern = await tenant.agent(tools=[WEATHER]), '{"city":"Bern"}'
    functions: Any = [{"name": "Where", "parameters": Where.model_json_schema()}]
    options: Any = {"model": agent, "functions": functions}
    world.models.script(MODEL, Says("Let me see.", calls=(("Where", bern), ("Where", bern))))
    first = (await client.chat.completions.create(**options, messages=HI)).choices[0]
    assert (first.finish_reason, first.message.content, first.message.tool_calls) == (
        "function_call",
        "Let me see.",
        None,
    )
    assert first.message.function_call
    assert (first.message.function_call.name, first.message.function_call.arguments) == ("Where", bern)
    result = {"role": "function", "name": "Where", "content": "Here."}
    messages: Any = [*HI, first.message.to_dict(), result]
    world.models.script(MODEL, Says(calls=((WEATHER, bern),)), Says("Wet."))
    second = (await client.chat.completions.create(**options, messages=messages)).choices[0]
    assert (second.message.content, second.finish_reason) == ("Wet.", "stop")
    assert [message["role"] for message in world.models.requests[-1].body["messages"]][-5:] == [
        *("user", "assistant", "tool", "assistant", "tool")
    ]
    world.models.script(MODEL, Says(calls=(("Where", bern),)))
    stream = await client.chat.completions.create(**options, messages=HI, function_call={"name": "Where"}, stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    told = [choice.delta.function_call for choice in choices if choice.delta.function_call]
    assert [(call.name, call.arguments) for call in told] == [("Where", bern)]
    assert choices[-1].finish_reason == "function_call"


def cut(finish: str = "length", **delta: Any) -> Streams:
    return Streams(({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]},))


async def test_the_answer_ends_at_a_stop_and_at_the_limit_of_the_client(
    world: World, tenant: Tenant, client: AsyncOpenAI
) -> None:
    agent, gate = await tenant.agent(tools=[WEATHER]), asyncio.Event()
    create = client.chat.completions.create
    # A server that does not know the option.
    world.models.script(MODEL, Says("One.\nObservation: two", waits=gate), Says("STOP"))
    pieces = []
    async with heard(world, tenant, gate):
        async for chunk in await create(model=agent, messages=HI, stop=["x", "\nObservation:"], stream=True):
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
    assert "".join(pieces) == "One."
    empty = (await create(model=agent, messages=HI, stop="STOP", temperature=0.5, seed=7)).choices[0]
    assert (empty.message.content, empty.finish_reason) == ("", "stop")
    body = world.models.requests[-1].body
    assert (body["stop"], body["temperature"], body["seed"]) == (["STOP"], 0.5, 7)

    call = {"index": 0, "id": "a", "function": {"name": WEATHER, "arguments": "{}"}}
    world.models.script(MODEL, cut(content='{"na'), cut(content=""), cut(content="Let", tool_calls=[call]))
    with pytest.raises(openai.LengthFinishReasonError):
        await client.chat.completions.parse(model=agent, messages=HI, response_format=City, max_completion_tokens=2)
    assert world.models.requests[-1].body["max_tokens"] == 2
    # A model that thinks may have no token left for the answer.
    short = (await create(model=agent, messages=HI, max_tokens=1)).choices[0]
    assert (short.message.content, short.finish_reason) == ("", "length")
    options: Any = {"metadata": {"a": "b"}, "temperature": 0.5, "max_output_tokens": 3}
    answer = await client.responses.create(model=agent, input="Hi", **options)
    assert (answer.status, answer.output_text) == ("incomplete", "Let")
    assert (answer.metadata, answer.temperature, answer.max_output_tokens) == ({"a": "b"}, 0.5, 3)


@pytest.mark.parametrize(
    ("finish", "told", "reason"),
    [
        ("length", "length", "max_output_tokens"),
        ("content_filter: RECITATION", "content_filter", "content_filter"),
        ("OTHER", "length", "max_output_tokens"),
    ],
)
async def test_of_an_answer_that_was_cut_no_call_is_handed_out(
    world: World, tenant: Tenant, client: AsyncOpenAI, finish: str, told: str, reason: str
) -> None:
    agent, call = await tenant.agent(), {"index": 0, "id": "a", "function": {"name": "Where", "arguments": "{}"}}
    world.models.script(MODEL, *[cut(finish, content=text, tool_calls=[call]) for text in ("", "Let", "Let")])
    tool: Any = {"type": "function", "function": {"name": "Where"}}
    options: Any = {"model": agent, "messages": HI, "tools": [tool]}
    whole = (await client.chat.completions.create(**options)).choices[0]
    assert (whole.message.content, whole.message.tool_calls, whole.finish_reason) == ("", None, told)
    choices = [chunk.choices[0] async for chunk in await client.chat.completions.create(**options, stream=True)]
    assert not any(choice.delta.tool_calls for choice in choices)
    assert ("".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason) == ("Let", told)
    function: Any = {"type": "function", "name": "Where"}
    answer = await client.responses.create(model=agent, input="Hi", tools=[function])
    assert (answer.status, answer.output_text, [item.type for item in answer.output]) == (
        "incomplete",
        "Let",
        ["message"],
    )
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == reason
