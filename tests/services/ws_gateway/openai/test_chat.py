"""Completions by the real process, judged by OpenAI's own client and by pydantic-ai."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import httpx
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from infra.clock import uuid7
from infra.service.api import MAX_LARGE_BODIES
from protos.messages.agent import ToolCall
from tests.services.ws_gateway.openai.conftest import WAIT_SECONDS, Hearing, World

T = TypeVar("T")

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
PATH = "/v1/chat/completions"
CUT_OFF = "The server restarts; send the request again."


@asynccontextmanager
async def answering(asked: Awaitable[T]) -> AsyncIterator[asyncio.Future[T]]:
    """Sends the request in the background; the block may await the answer."""
    task = asyncio.ensure_future(asked)
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Reading(Hearing):
    """A stream that is read in the background. `text` is the text so far, `error` the error that ended it."""

    def __init__(self) -> None:
        self.text = ""
        self.chunks: list[ChatCompletionChunk] = []
        self.error: openai.APIError | None = None

    async def read(self, client: AsyncOpenAI, model: str, **fields: Any) -> None:
        try:
            stream = await client.chat.completions.create(model=model, messages=HI, stream=True, **fields)
            async for chunk in stream:
                self.chunks.append(chunk)
                self.text += "".join(choice.delta.content or "" for choice in chunk.choices)
        except openai.APIError as error:
            self.error = error

    async def has(self, text: str) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.text != text:
                assert text.startswith(self.text)
                await asyncio.sleep(0.02)

    @property
    def finish_reasons(self) -> list[str]:
        return [choice.finish_reason for chunk in self.chunks for choice in chunk.choices if choice.finish_reason]


async def test_the_tenants_agents_are_its_models(world: World, nobody: str) -> None:
    mine = [world.agent.new_agent("models") for _ in range(3)]
    off, theirs = world.agent.new_agent("models", enabled=False), world.agent.new_agent("other")
    async with world.client("models", scopes=("read",)) as client:
        listed = await client.models.list()
        assert [model.id for model in listed.data] == mine
        pages = world.agent.pages
        found = await client.models.retrieve(mine[1])
        assert (found.id, found.object, found.created, found.owned_by) == (mine[1], "model", 1767323045, "models")
        assert found.model_extra == {"name": "Helper"}
        for none in (off, theirs, nobody, "gpt-4o"):
            with pytest.raises(openai.NotFoundError) as missing:
                await client.models.retrieve(none)
            assert missing.value.code == "model_not_found"
        assert world.agent.pages == pages


async def test_a_completion_carries_the_conversation_and_gets_the_reply(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Grüße 🦀"},
    ]
    async with answering(client.chat.completions.with_raw_response.create(model=model, messages=messages)) as answer:
        run = await world.run()
        assert str(run.asked.agent_id) == model
        assert run.asked.body == {
            "text": "Grüße 🦀",
            "history": [{"role": "user", "text": "One"}, {"role": "assistant", "text": "Yes?"}],
            "system": "Be brief.",
        }
        await run.answers("Grüße\nfrom two lines", input_tokens=100, cached_tokens=60, output_tokens=9)
        raw = await answer
    assert raw.headers["x-claw-run-id"] == str(run.id)
    found = raw.parse()
    assert (found.id, found.model, found.object) == (f"chatcmpl-{run.id}", model, "chat.completion")
    [choice] = found.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        "Grüße\nfrom two lines",
        "stop",
    )
    assert found.usage
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (100, 9, 109)
    assert found.usage.prompt_tokens_details
    assert found.usage.prompt_tokens_details.cached_tokens == 60


async def test_what_was_not_reported_is_no_usage(world: World, client: AsyncOpenAI, model: str) -> None:
    async with answering(client.chat.completions.create(model=model, messages=HI)) as answer:
        await (await world.run()).answers("Yes.")
        assert (await answer).usage is None
    reading = Reading()
    async with answering(reading.read(client, model, stream_options={"include_usage": True})) as read:
        await (await world.run()).answers("Yes.")
        await read
    assert (reading.text, reading.error) == ("Yes.", None)
    assert [chunk.usage for chunk in reading.chunks] == [None] * len(reading.chunks)


async def test_a_stream_is_told_by_the_clients_own_helper(world: World, client: AsyncOpenAI, model: str) -> None:
    pieces: list[str] = []

    async def read() -> Any:
        async with client.chat.completions.stream(
            model=model, messages=HI, stream_options={"include_usage": True}
        ) as stream:
            async for event in stream:
                if event.type == "content.delta" and event.delta:
                    pieces.append(event.delta)
            return await stream.get_final_completion()

    async with answering(read()) as answer:
        run = await world.run()
        await run.begins()
        await run.step(1)
        while not pieces:
            await run.writes(1, "Good")
            await asyncio.sleep(0.02)
        await run.writes(2, " day")
        while "".join(pieces) != "Good day":
            await asyncio.sleep(0.02)
        world.agent.usage[run.id] = {"input_tokens": 12, "cached_tokens": None, "output_tokens": 5}
        await run.step_ends(1)
        await run.replies("Good day")
        found = await answer
    assert pieces == ["Good", " day"]
    [choice] = found.choices
    assert (choice.message.content, choice.finish_reason, found.id) == ("Good day", "stop", f"chatcmpl-{run.id}")
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (12, 5)
    assert found.usage.prompt_tokens_details is None


async def test_a_stream_begins_with_the_role_and_ends_with_done(world: World, model: str) -> None:
    body = {"model": model, "messages": HI, "stream": True}
    async with world.platform.client("ws_gateway", "acme") as client, answering(client.post(PATH, json=body)) as asked:
        await (await world.run()).answers("Good day", input_tokens=12, output_tokens=5)
        answer = await asked
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    first, text, last, done, end = answer.text.split("\n\n")
    assert '"delta":{"role":"assistant","content":""}' in first
    assert '"delta":{"content":"Good day"}' in text
    assert '"finish_reason":"stop"' in last
    assert (done, end) == ("data: [DONE]", "")
    # No client requested it.
    assert "usage" not in answer.text


@pytest.mark.parametrize("reason", ["length", "content_filter"])
async def test_an_answer_that_was_cut_off_says_so(world: World, client: AsyncOpenAI, model: str, reason: str) -> None:
    filtered = reason == "content_filter"
    async with answering(client.chat.completions.create(model=model, messages=HI)) as answer:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await run.replies("half a", finish_reason="length", filtered=filtered)
        assert (await answer).choices[0].finish_reason == reason
    body = {"model": model, "messages": HI, "stream": True}
    async with world.platform.client("ws_gateway", "acme") as http, answering(http.post(PATH, json=body)) as asked:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await run.replies("half a", finish_reason="length", filtered=filtered)
        text = (await asked).text
    assert text.count(f'"finish_reason":"{reason}"') == 1
    assert '"finish_reason":"stop"' not in text


async def test_behind_a_missed_piece_the_rest_comes_with_the_reply(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Good")
        await run.writes(3, "!")
        await run.replies("Good day!")
        await read
    assert (reading.text, reading.error, reading.finish_reasons) == ("Good day!", None, ["stop"])


async def test_another_attempt_ends_a_stream_that_has_text_and_nothing_is_said_twice(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    for by_text in (True, False):
        reading = Reading()
        async with answering(reading.read(client, model)) as read:
            run = await world.run()
            await run.begins()
            await run.step(1)
            await reading.hears(run, "Good")
            if by_text:
                await run.writes(1, "Good day", attempt=2)
            else:
                await run.step(1, attempt=2)
            await read
            await world.cancelled(run)
        assert reading.text == "Good"
        assert reading.error
        assert reading.error.code == "stream_interrupted"
        assert reading.finish_reasons == []


async def test_another_attempt_is_no_matter_before_the_first_text(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await run.step(1, attempt=2)
        await run.replies("Good day")
        await read
    assert (reading.text, reading.error) == ("Good day", None)


async def test_a_reply_that_is_not_what_was_sent_ends_the_stream(world: World, client: AsyncOpenAI, model: str) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Good")
        await run.replies("Bad day")
        await read
    assert (reading.text, reading.finish_reasons) == ("Good", [])
    assert reading.error
    assert reading.error.code == "stream_interrupted"


async def test_text_before_a_tool_call_is_a_paragraph_of_its_own(world: World, client: AsyncOpenAI, model: str) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Let me see.")
        await run.step_ends(1)
        await run.step(2, kind="tool")
        await run.step_ends(2, kind="tool")
        await run.step(3)
        await run.writes(1, "It is", step=3)
        await reading.has("Let me see.\n\nIt is")
        await run.replies("It is wet.")
        await read
    assert (reading.text, reading.error) == ("Let me see.\n\nIt is wet.", None)


CALLS = (
    ToolCall(id="call_1", name="place", arguments='{"of":"me"}'),
    ToolCall(id="call_2", name="time", arguments=""),
)


async def test_calls_of_the_clients_tools_are_the_answer(world: World, client: AsyncOpenAI, model: str) -> None:
    for text in ("", "Let me see."):
        async with answering(client.chat.completions.create(model=model, messages=HI)) as answer:
            run = await world.run()
            await run.begins()
            await run.replies(text, *CALLS)
            [choice] = (await answer).choices
        assert (choice.message.content, choice.finish_reason) == (text or None, "tool_calls")
        assert choice.message.tool_calls
        assert [
            (call.id, call.function.name, call.function.arguments)
            for call in choice.message.tool_calls
            if call.type == "function"
        ] == [(call.id, call.name, call.arguments) for call in CALLS]


async def test_a_stream_ends_with_the_calls(world: World, client: AsyncOpenAI, model: str) -> None:
    texts: list[str] = []
    called: list[tuple[int, str, str]] = []

    async def read() -> Any:
        async with client.chat.completions.stream(model=model, messages=HI) as stream:
            async for event in stream:
                if event.type == "content.delta":
                    texts.append(event.delta)
                elif event.type == "tool_calls.function.arguments.done":
                    called.append((event.index, event.name, event.arguments))
            return await stream.get_final_completion()

    async with answering(read()) as answer:
        run = await world.run()
        await run.begins()
        await run.step(1)
        while not texts:
            await run.writes(1, "Let me")
            await asyncio.sleep(0.02)
        await run.replies("Let me see.", *CALLS)
        [choice] = (await answer).choices
    assert [text for text in texts if text] == ["Let me", " see."]
    assert called == [(n, call.name, call.arguments) for n, call in enumerate(CALLS)]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    assert [call.id for call in choice.message.tool_calls] == ["call_1", "call_2"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        ("failed", openai.InternalServerError, "run_failed"),
        ("indeterminate", openai.InternalServerError, "run_indeterminate"),
        ("refused", openai.RateLimitError, "insufficient_quota"),
        ("cancelled", openai.ConflictError, "run_cancelled"),
    ],
)
async def test_a_run_without_a_reply_is_an_error_with_its_status_and_is_not_asked_for_again(
    world: World,
    client: AsyncOpenAI,
    model: str,
    stream: bool,
    status: str,
    error: type[openai.APIStatusError],
    code: str,
) -> None:
    asked = client.chat.completions.create(model=model, messages=HI, stream=stream)
    async with answering(asked) as answer:
        run = await world.run()
        await run.begins()
        await run.fails(status)
        with pytest.raises(error) as failed:
            await answer
    assert (failed.value.code, failed.value.response.headers["x-claw-run-id"]) == (code, str(run.id))
    if status != "cancelled":
        assert "out of luck" in failed.value.message
    assert world.agent.completions.empty()


async def test_a_run_that_fails_behind_its_first_text_ends_the_stream_with_an_error(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    reading = Reading()
    async with answering(reading.read(client, model)) as read:
        run = await world.run()
        await run.begins()
        await run.step(1)
        await reading.hears(run, "Good")
        await run.fails("refused")
        await read
    assert (reading.text, reading.finish_reasons) == ("Good", [])
    assert reading.error
    assert (reading.error.code, reading.error.message) == ("insufficient_quota", "out of luck")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("key", [None, "k"])
async def test_a_client_that_goes_cancels_the_run_unless_it_can_come_again(
    world: World, client: AsyncOpenAI, model: str, stream: bool, key: str | None
) -> None:
    key = key and f"{model}-{stream}"
    headers = {"Idempotency-Key": key} if key else {}
    asked = client.chat.completions.create(model=model, messages=HI, stream=stream, extra_headers=headers)
    async with answering(asked):
        run = await world.run()
        await run.begins()
        await world.agent.was_read(run.id)
    if key is None:
        await world.cancelled(run)
        return
    async with answering(client.chat.completions.create(model=model, messages=HI, extra_headers=headers)) as answer:
        again = await world.run()
        assert (again.id, again.asked.key) == (run.id, key)
        await run.replies("Good day")
        assert (await answer).choices[0].message.content == "Good day"
    assert run.id not in world.agent.cancelled
    # The text sent so far is an answer as well.
    found = await client.chat.completions.create(model=model, messages=HI, extra_headers=headers)
    assert (found.id, found.choices[0].message.content) == (f"chatcmpl-{run.id}", "Good day")
    assert (await world.run()).id == run.id
    other: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Bye"}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=model, messages=other, extra_headers=headers)
    assert refused.value.param == "idempotency_key"


def assert_invalid(answer: httpx.Response, param: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), answer.text


def nested(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


async def test_what_cannot_be_taken_is_named(world: World, client: AsyncOpenAI, model: str) -> None:
    image: Any = [{"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=model, messages=[*HI, {"role": "user", "content": image}])
    assert (refused.value.param, refused.value.type) == ("messages[1].content[0].type", "invalid_request_error")
    bad: list[tuple[Any, str]] = [
        ({"model": model}, "messages"),
        ({"model": model, "messages": []}, "messages"),
        ({"model": model, "messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"model": model, "messages": HI, "stream": "maybe"}, "stream"),
        ({"model": model, "messages": HI, "n": 2}, "n"),
        ({"model": model, "messages": HI, "tools": [{"type": "function"}]}, "tools[0].function"),
        ({"messages": HI}, "model"),
        ([], "body"),
        ("{", "body"),
    ]
    async with world.platform.client("ws_gateway", "acme") as plain:
        for body, param in bad:
            sent = {"content": body} if isinstance(body, str) else {"json": body}
            answer = await plain.post(PATH, headers={"content-type": "application/json"}, **sent)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, None), answer.text
            assert error["message"]
        for text, param in ((r"\u0000", "messages[0].content"), (r"\ud800", "messages[0].content")):
            content = f'{{"model":"{model}","messages":[{{"role":"user","content":"{text}"}}]}}'
            answer = await plain.post(PATH, headers={"content-type": "application/json"}, content=content)
            assert_invalid(answer, param)
        for number in ("NaN", "-Infinity", "1e999"):
            content = f'{{"model":"{model}","messages":[{{"role":"user","content":"Hi"}}],"temperature":{number}}}'
            for path in (PATH, "/v1/responses"):
                answer = await plain.post(path, headers={"content-type": "application/json"}, content=content)
                assert_invalid(answer, "temperature")
        deep = {"model": model, "messages": HI, "metadata": nested(101)}
        assert_invalid(await plain.post(PATH, json=deep), "body")
        for key in ("", "ü", "x" * 256):
            headers = {b"Idempotency-Key": key.encode("latin-1")}
            answer = await plain.post(PATH, headers=headers, json={"model": model, "messages": HI})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "idempotency-key"), answer.text
        large = await plain.post(
            PATH, json={"model": model, "messages": [{"role": "user", "content": "x" * 1_100_000}]}
        )
        assert (large.status_code, large.json()["error"]["type"]) == (413, "invalid_request_error")
    assert world.agent.completions.empty()


async def test_large_images_reach_the_agent_and_few_are_in_memory_at_once(world: World, model: str) -> None:
    image = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(3 * 1024**2)).decode()
    shown: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]
    async with world.client() as client:

        def ask(messages: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(client.chat.completions.create(model=model, messages=messages))

        world.agent.accepting.clear()
        asked = [ask(shown) for _ in range(5)]
        runs = [await world.run()]
        # A message of ordinary size does not wait for them.
        for _ in range(3):
            asked.append(ask(HI))
            runs.append(await world.run())
        assert [run.asked.body.get("images") for run in runs] == [[image]] + [None] * 3
        # Another tenant has a place of its own.
        async with world.client("other") as others:
            with pytest.raises(openai.NotFoundError):
                await others.chat.completions.create(model=model, messages=shown)
        world.agent.accepting.set()
        for run in runs:
            await run.answers("A cat.")
        for _ in asked[len(runs) :]:
            await (await world.run()).answers("A cat.")
        assert {answer.choices[0].message.content for answer in await asyncio.gather(*asked)} == {"A cat."}


async def test_a_tenants_large_bodies_are_worked_on_few_at_a_time(world: World, model: str) -> None:
    """Each costs as much time of the event loop as a hundred small ones: three hundred at once made the calls of other
    tenants fail."""
    long: Any = [{"role": "user", "content": "x" * 90_000}]
    at_once = MAX_LARGE_BODIES // 2
    async with world.client() as client:

        def ask(messages: Any) -> asyncio.Task[Any]:
            return asyncio.create_task(client.chat.completions.create(model=model, messages=messages))

        world.agent.accepting.clear()
        asked = [ask(long) for _ in range(at_once + 2)]
        runs = [await world.run() for _ in range(at_once)]
        asked.append(ask(HI))
        runs.append(await world.run())
        assert [len(run.asked.body["text"]) for run in runs] == [90_000] * at_once + [2]
        world.agent.accepting.set()
        runs += [await world.run() for _ in range(2)]
        for run in runs:
            await run.answers("Yes.")
        assert {answer.choices[0].message.content for answer in await asyncio.gather(*asked)} == {"Yes."}


async def test_who_may_not_gets_the_clients_own_errors(world: World, model: str, nobody: str) -> None:
    async with world.client("other") as client:
        for none in (model, nobody, "gpt-4o"):
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model=none, messages=HI)
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    tenant = str(uuid7())
    async with world.client(tenant, scopes=("read",)) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.chat.completions.create(model=model, messages=HI)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(model)
    acts = [act for _, act in await world.platform.outbox("ws_gateway", "audit.logs") if act["tenant_id"] == tenant]
    assert [(act["object_id"], act["outcome"], act["details"]) for act in acts] == [
        ("POST /v1/chat/completions", "denied", {"status": "403"}),
        ("GET /v1/models/{model}", "denied", {"status": "404", "model": model}),
    ]
    async with httpx.AsyncClient(base_url=world.platform.url("ws_gateway"), trust_env=False) as plain:
        answer = await plain.post(PATH, json={"model": model, "messages": HI})
        assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


async def test_an_unknown_path_or_method_is_an_error_of_the_clients_shape(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.embeddings.create(model=model, input="Hi")
    assert missing.value.body == {
        "message": "Not Found",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    async with world.platform.client("ws_gateway", "acme") as plain:
        wrong = await plain.get(PATH)
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["type"] == "invalid_request_error"
        # Other paths have the errors of the platform.
        assert (await plain.get("/v2/models")).headers["content-type"] == "application/problem+json"


async def test_an_agent_that_is_away_is_a_503(world: World, model: str) -> None:
    world.agent.away = True
    async with world.platform.client("ws_gateway", "acme") as client:
        answer = await client.post(PATH, json={"model": model, "messages": HI})
    world.agent.away = False
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["type"] == "server_error"


async def test_pydantic_ai_talks_to_an_agent_as_to_any_model(world: World, client: AsyncOpenAI, model: str) -> None:
    agent = Agent(OpenAIChatModel(model, provider=OpenAIProvider(openai_client=client)), system_prompt="Be brief.")
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
        await run.answers("Good night", input_tokens=12, output_tokens=5)
        assert await told == "Good night"


async def test_the_page_of_the_api_shows_what_a_request_takes(world: World) -> None:
    async with world.platform.client("ws_gateway") as client:
        document = (await client.get("/docs/openapi.json")).json()
    schema = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatRequest"}
    assert {"/v1/models", "/v1/models/{model}", "/v1/responses"} <= document["paths"].keys()


async def test_a_gateway_that_is_stopped_says_so_and_keeps_only_runs_that_can_be_asked_for_again(
    world: World, client: AsyncOpenAI, model: str
) -> None:
    body = {"model": model, "messages": HI}
    key = {"Idempotency-Key": f"stop-{model}"}
    reading = Reading()
    async with world.platform.client("ws_gateway", "acme") as plain, AsyncExitStack() as stack:
        tasks, runs = [], []
        for ask in (plain.post(PATH, json=body), plain.post(PATH, json=body, headers=key)):
            tasks.append(await stack.enter_async_context(answering(ask)))
            runs.append(await world.run())
            await world.agent.was_read(runs[-1].id)
        read = await stack.enter_async_context(answering(reading.read(client, model)))
        runs.append(await world.run())
        await runs[2].begins()
        await runs[2].step(1)
        await reading.hears(runs[2], "Good")
        assert await asyncio.to_thread(world.platform.stop, "ws_gateway") == 0
        answers = await asyncio.gather(*tasks)
        await read
    for answer in answers:
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == CUT_OFF
    assert reading.error
    assert (reading.text, reading.error.message) == ("Good", CUT_OFF)
    assert [run.id in world.agent.cancelled for run in runs] == [True, False, True]
    await world.platform.start("ws_gateway")
