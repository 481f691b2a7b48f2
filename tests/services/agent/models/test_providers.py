"""Provider models against the strict fake server: requests, answers, and the classification of errors."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from infra.outgoing.client import Outgoing
from services.agent.models.contract import (
    AssistantTurn,
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    Passage,
    Prompt,
    Sampling,
    Tool,
    ToolCall,
    ToolTurn,
    Turn,
    Usage,
    UserTurn,
)
from services.agent.models.providers import Providers
from services.agent.models.tool_schemas import tool_schema
from tooling.testing import model_shapes as shapes
from tooling.testing.model_server import KEY, Fails, ModelServer, Refuses, Says, Streams, model_server

OPENAI = "openai/gpt-4o-mini"
ANTHROPIC = "anthropic/claude-haiku-5-5"
BOTH = pytest.mark.parametrize("name", [OPENAI, ANTHROPIC])
WEATHER = Tool("weather.now", "The weather.", {"type": "object", "properties": {"city": {"type": "string"}}})
# Must arrive unchanged: a zero byte, an emoji of four bytes, a right-to-left mark, a chat template's token.
STRANGE = "a\x00b 🦀 \u200f<|im_start|> c\n "


@pytest.fixture
async def server() -> AsyncIterator[ModelServer]:
    async with model_server() as running:
        yield running
        assert running.refused == []


@pytest.fixture
async def providers() -> AsyncIterator[Providers]:
    outgoing = Outgoing(allow_private=True)
    found = Providers(outgoing.transport())
    yield found
    await found.close()
    await outgoing.close()


async def ask(server: ModelServer, providers: Providers, name: str, prompt: Prompt, key: str = KEY) -> ModelAnswer:
    heard: list[str] = []

    async def hear(text: str) -> None:
        heard.append(text)

    answer = await providers.model(name, ModelEndpoint(server.url, key)).answer(prompt, hear)
    assert "".join(heard) == answer.text
    return answer


@BOTH
async def test_the_last_user_message_is_the_persons_text_and_passages_go_into_the_system_message(
    name: str, server: ModelServer, providers: Providers
) -> None:
    passage = Passage("Returns take 30 days.", 0.9, "d1", "handbook.md", "Returns", 2)
    turns = (UserTurn("Hi"), AssistantTurn("Hello"), UserTurn(STRANGE))
    await ask(server, providers, name, Prompt("Be kind.", turns, (passage,)))
    [asked] = server.requests
    assert asked.last_user_text == STRANGE
    assert [message["role"] for message in asked.body["messages"]][-3:] == ["user", "assistant", "user"]
    assert asked.system.startswith("Be kind.")
    assert 'source="handbook.md, Returns, page 2">\nReturns take 30 days.' in asked.system


@BOTH
async def test_a_tool_is_called_and_its_result_is_given_back(
    name: str, server: ModelServer, providers: Providers
) -> None:
    own_name = name.partition("/")[2]
    server.script(own_name, Says(calls=(("weather_now", '{"city":"Bern"}'),)), Says("Rain."))
    prompt = Prompt("", (UserTurn("Weather in Bern?"),), tools=(WEATHER,))
    first = await ask(server, providers, name, prompt)
    [call] = first.calls
    # Under the tool's own name, although the provider allows no dot in names.
    assert (call.name, call.arguments) == ("weather.now", '{"city":"Bern"}')
    turns = (*prompt.turns, AssistantTurn(first.text, first.calls), ToolTurn(call, '"rain"'))
    second = await ask(server, providers, name, Prompt("", turns, tools=(WEATHER,)))
    assert second.text == "Rain."
    assert second.calls == ()


@BOTH
async def test_usage_is_the_providers_with_cached_tokens_inside_the_input(
    name: str, server: ModelServer, providers: Providers
) -> None:
    server.script(name.partition("/")[2], Says("Yes.", usage=(100, 60, 9, 4)))
    answer = await ask(server, providers, name, Prompt("", (UserTurn("?"),)))
    reasoning = 4 if name == OPENAI else None
    assert answer.usage == Usage(100, 60, None if name == OPENAI else 0, 9, reasoning)


async def test_usage_that_is_not_reported_is_not_zero(server: ModelServer, providers: Providers) -> None:
    server.script("gpt-4o-mini", Says("Yes.", usage=None))
    answer = await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),)))
    assert answer.usage == Usage()


YES = {"type": "text", "text": "Yes."}


def _anthropic(begun: dict[str, Any], ended: dict[str, Any], *blocks: dict[str, Any]) -> Streams:
    """An answer of Anthropic's shape with these fields in its first and its last event."""
    events: tuple[dict[str, Any], ...] = (
        {
            "type": "message_start",
            "message": {"id": "m", "type": "message", "role": "assistant", "content": []} | begun,
        },
        *(
            event
            for n, block in enumerate(blocks or (YES,))
            for event in (
                {"type": "content_block_start", "index": n, "content_block": block},
                {"type": "content_block_stop", "index": n},
            )
        ),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, **ended},
        {"type": "message_stop"},
    )
    lines = ((b"event: " + one["type"].encode() + b"\ndata: " + msgspec.json.encode(one) + b"\n\n") for one in events)
    return Streams(tuple(lines), done=False)


@pytest.mark.parametrize(
    ("begun", "ended", "usage"),
    [
        ({"usage": {"input_tokens": 10, "output_tokens": 1}}, {"usage": {"output_tokens": 3}}, (10, 3)),
        (
            {"usage": {"input_tokens": 0, "output_tokens": 0}},
            {"usage": {"input_tokens": 10, "output_tokens": 3}},
            (10, 3),
        ),
        ({}, {"usage": {"input_tokens": 10, "output_tokens": 3}}, (10, 3)),
        ({"usage": None}, {"usage": {"input_tokens": 10, "output_tokens": 3}}, (10, 3)),
        ({}, {}, (None, None)),
        ({"usage": {"input_tokens": 0, "output_tokens": 0}}, {"usage": {"output_tokens": 0}}, (None, None)),
        ({"usage": {"input_tokens": 10, "output_tokens": 0}}, {"usage": {"output_tokens": 0}}, (None, None)),
    ],
)
async def test_a_usage_of_anthropics_shape_that_is_missing_or_zero_is_not_reported(
    server: ModelServer,
    providers: Providers,
    begun: dict[str, Any],
    ended: dict[str, Any],
    usage: tuple[int | None, int | None],
) -> None:
    server.script("claude-haiku-5-5", _anthropic(begun, ended))
    answer = await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),)))
    assert answer.text == "Yes."
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == usage


async def test_an_answer_of_anthropics_shape_without_an_end_was_cut_off(
    server: ModelServer, providers: Providers
) -> None:
    whole = _anthropic({}, {}).chunks
    no_reason = _anthropic({}, {"delta": {"stop_reason": None}}).chunks
    server.script("claude-haiku-5-5", *(Streams(one, done=False) for one in (whole[:-2], whole[:-1], no_reason)))
    prompt = Prompt("", (UserTurn("?"),))
    with pytest.raises(ModelFailed, match="the answer was cut off") as failed:
        await ask(server, providers, ANTHROPIC, prompt)
    assert failed.value.transient
    for _ in range(2):
        assert (await ask(server, providers, ANTHROPIC, prompt)).text == "Yes."


async def test_a_character_that_anthropics_shape_cuts_in_two_is_whole(
    server: ModelServer, providers: Providers
) -> None:
    first, start, *rest = _anthropic({}, {}).chunks
    event = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":'
    halves = (b'%s{"type":"text_delta","text":"%s"}}\n\n' % (event, half) for half in (rb"\ud83d", rb"\ude00 \ud83d"))
    server.script("claude-haiku-5-5", Streams((first, start, *halves, *rest), done=False))
    answer = await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),)))
    assert answer.text == "Yes.😀 \ufffd"


async def test_a_call_of_claude_without_arguments_has_an_empty_object(
    server: ModelServer, providers: Providers
) -> None:
    block = {"type": "tool_use", "id": "t", "name": "weather_now", "input": {}}
    begin, start, *rest = _anthropic({}, {"delta": {"stop_reason": "tool_use"}}, block).chunks
    empty = {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": ""}}
    event = b"event: content_block_delta\ndata: " + msgspec.json.encode(empty) + b"\n\n"
    server.script("claude-haiku-5-5", Streams((begin, start, event, *rest), done=False))
    answer = await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),), tools=(WEATHER,)))
    assert [(call.name, call.arguments) for call in answer.calls] == [("weather.now", "{}")]


@pytest.mark.parametrize("chunks", [_anthropic({}, {"delta": None}).chunks, _anthropic({}, {}).chunks[1:]])
async def test_an_answer_that_is_not_of_anthropics_shape_is_malformed(
    chunks: tuple[bytes, ...], server: ModelServer, providers: Providers
) -> None:
    server.script("claude-haiku-5-5", Streams(chunks, done=False))
    with pytest.raises(ModelFailed, match="malformed") as failed:
        await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),)))
    assert failed.value.transient


@BOTH
async def test_transient_and_permanent_errors_are_distinguished(
    name: str, server: ModelServer, providers: Providers
) -> None:
    server.script(name.partition("/")[2], Fails(429, retry_after=7), Fails(500), Fails(400), Fails(404))
    found = []
    for _ in range(4):
        with pytest.raises(ModelFailed) as failed:
            await ask(server, providers, name, Prompt("", (UserTurn("?"),)))
        found.append((failed.value.transient, failed.value.after))
    assert found == [(True, timedelta(seconds=7)), (True, None), (False, None), (False, None)]


@BOTH
async def test_a_delay_of_years_is_one_of_a_day(name: str, server: ModelServer, providers: Providers) -> None:
    server.script(name.partition("/")[2], Fails(429, retry_after=10**9), Fails(429, retry_after=10**30))
    for _ in range(2):
        with pytest.raises(ModelFailed) as failed:
            await ask(server, providers, name, Prompt("", (UserTurn("?"),)))
        assert failed.value.after == timedelta(days=1)


@BOTH
async def test_a_long_text_arrives_unchanged_for_every_packet_size(
    name: str, server: ModelServer, providers: Providers
) -> None:
    text = "Zürich 🦀 漢字 \u200f. " * 2_000
    assert len(text) > 25_000
    server.script(name.partition("/")[2], *(Says(text, packet=packet) for packet in (4093, 101)))
    for _ in range(2):
        assert (await ask(server, providers, name, Prompt("", (UserTurn("?"),)))).text == text


@pytest.mark.parametrize("answer", [Says(comments=True), Says("A long text", stalls_after=0)])
async def test_an_answer_that_does_not_begin_times_out(
    answer: Says, server: ModelServer, providers: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.agent.models.chat.FIRST_TOKEN_SECONDS", 0.3)
    server.script("gpt-4o-mini", answer)
    with pytest.raises(ModelFailed, match=r"no answer began within 0\.3 seconds") as failed:
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),)))
    assert failed.value.transient


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Says("A long text", usage=None, closed_after=2), "the answer was cut off"),
        (Says("A long text", cut_after=2), "RemoteProtocolError"),
    ],
)
async def test_an_answer_that_is_cut_off_is_a_failure(
    answer: Says, reason: str, server: ModelServer, providers: Providers
) -> None:
    server.script("gpt-4o-mini", answer)
    with pytest.raises(ModelFailed) as failed:
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),)))
    assert (failed.value.transient, failed.value.reason) == (True, f"{OPENAI}: {reason}")


@pytest.mark.parametrize(
    ("word", "reason"),
    [("end_turn", "stop"), ("max_tokens", "length"), ("pause_turn", "length"), ("refusal", "content_filter")],
)
async def test_the_end_of_an_answer_of_claude_is_told(
    word: str, reason: str, server: ModelServer, providers: Providers
) -> None:
    model = ANTHROPIC.partition("/")[2]
    for told in (word, "aborted"):
        events = shapes.ANTHROPIC.events(model, ["Hi"], (), (10, 0, 3, 0))
        server.script(model, Streams(tuple(event.replace("end_turn", told).encode() for event in events), done=False))
    prompt = Prompt("", (UserTurn("?"),))
    assert (await ask(server, providers, ANTHROPIC, prompt)).finish_reason == reason
    with pytest.raises(ModelFailed, match="failed during the answer") as failed:
        await ask(server, providers, ANTHROPIC, prompt)
    assert failed.value.usage
    assert (failed.value.usage.input_tokens, failed.value.usage.output_tokens) == (10, 3)


@pytest.mark.parametrize("whole", [False, True])
async def test_the_explanation_of_claudes_refusal_is_the_text_of_an_answer_without_another(
    server: ModelServer, providers: Providers, *, whole: bool
) -> None:
    why = {"type": "refusal", "category": "cyber", "explanation": "I cannot do that."}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
    usage = {"input_tokens": 10, "output_tokens": 3}

    def refused(details: Any, *blocks: dict[str, Any]) -> Refuses | Streams:
        message = {"id": "m", "type": "message", "role": "assistant", "content": blocks, "usage": usage}
        if whole:
            return Refuses(200, message | {"stop_reason": "refusal", "stop_details": details})
        events: list[dict[str, Any]] = [{"type": "message_start", "message": message | {"content": []}}]
        for n, block in enumerate(blocks):
            events += [{"type": "content_block_start", "index": n, "content_block": block}]
            events += [{"type": "content_block_stop", "index": n}]
        delta = {"stop_reason": "refusal", "stop_details": details}
        events += [{"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]
        return Streams(tuple(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events), done=False)

    text = {"type": "text", "text": "Half an answer"}
    prompt = Prompt("", (UserTurn("?"),))
    for blocks, expected in (
        ((), ("I cannot do that.", "refusal")),
        ((thought,), ("I cannot do that.", "refusal")),
        ((text,), ("Half an answer", "content_filter")),
    ):
        server.script(ANTHROPIC.partition("/")[2], refused(why, *blocks))
        answer = await ask(server, providers, ANTHROPIC, prompt)
        assert (answer.text, answer.finish_reason, answer.usage.output_tokens) == (*expected, 3)
    for details in (None, why | {"explanation": None}, why | {"explanation": " "}, why | {"explanation": 7}):
        server.script(ANTHROPIC.partition("/")[2], refused(details, thought))
        with pytest.raises(ModelFailed, match="content filter withheld the answer"):
            await ask(server, providers, ANTHROPIC, prompt)


async def test_an_endless_answer_is_a_failure(
    server: ModelServer, providers: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.outgoing.client.MAX_CLIENT_BYTES", 100_000)
    server.script("gpt-4o-mini", Says("Again and again. ", endless=True))
    with pytest.raises(ModelFailed, match="answer: larger than the limit of 100000 bytes") as failed:
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),)))
    assert not failed.value.transient


async def test_a_wrong_key_is_a_permanent_failure_and_is_not_shown_in_the_reason(
    server: ModelServer, providers: Providers
) -> None:
    with pytest.raises(ModelFailed, match=r"HTTP 401 \(is the provider's api_key right\?\)") as failed:
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),)), key="sk-wrong")
    assert not failed.value.transient
    assert "sk-wrong" not in failed.value.reason
    server.refused.clear()


async def test_an_unreachable_provider_is_a_transient_failure(providers: Providers) -> None:
    async def hear(text: str) -> None:
        raise AssertionError("nothing answers there")

    nowhere = providers.model(OPENAI, ModelEndpoint("http://127.0.0.1:1/v1", KEY))
    with pytest.raises(ModelFailed) as failed:
        await nowhere.answer(Prompt("", (UserTurn("?"),)), hear)
    assert failed.value.transient


@BOTH
async def test_a_private_address_is_a_permanent_failure(name: str, server: ModelServer) -> None:
    guarded = Outgoing(allow_private=False)
    providers = Providers(guarded.transport())
    with pytest.raises(ModelFailed, match="not on the public internet") as failed:
        await ask(server, providers, name, Prompt("", (UserTurn("?"),)))
    assert not failed.value.transient
    assert server.requests == []
    await providers.close()
    await guarded.close()


@BOTH
@pytest.mark.parametrize("calls", [(), (("weather_now", '{"city":"Bern"}'), ("weather_now", '{"city":"Genf"}'))])
async def test_an_endpoint_that_ignores_streaming_is_supported(
    name: str, calls: tuple[tuple[str, str], ...], server: ModelServer, providers: Providers
) -> None:
    server.script(name.partition("/")[2], Says("In one piece.", calls=calls, whole=True))
    answer = await ask(server, providers, name, Prompt("", (UserTurn("?"),), tools=(WEATHER,)))
    assert answer.text == "In one piece."
    assert [call.arguments for call in answer.calls] == [arguments for _, arguments in calls]
    assert answer.usage == (Usage(12, 0, None, 5, 0) if name == OPENAI else Usage(12, 0, 0, 5, None))
    assert answer.finish_reason == ("tool_call" if calls else "stop")
    assert len(server.requests) == 1


async def test_an_error_and_thoughts_in_one_json_of_anthropics_shape_are_read(
    server: ModelServer, providers: Providers
) -> None:
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": "too long"}}
    whole = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Rain?", "signature": "s"},
            {"type": "tool_use", "id": "t", "name": "weather_now", "input": {"city": "Bern"}},
        ],
    }
    server.script(ANTHROPIC.partition("/")[2], *(Refuses(200, body) for body in (error, whole)))
    prompt = Prompt("", (UserTurn("?"),), tools=(WEATHER,))
    with pytest.raises(ModelFailed, match="HTTP 400: too long") as failed:
        await ask(server, providers, ANTHROPIC, prompt)
    assert not failed.value.transient
    answer = await ask(server, providers, ANTHROPIC, prompt)
    assert [call.arguments for call in answer.calls] == ['{"city":"Bern"}']
    assert answer.reasoning
    assert answer.reasoning.details[0]["signature"] == "s"
    assert answer.usage == Usage()


async def test_events_of_anthropics_shape_without_names_are_read(server: ModelServer, providers: Providers) -> None:
    unnamed = (event.partition(b"\n")[2] for event in _anthropic({}, {}).chunks if isinstance(event, bytes))
    server.script(ANTHROPIC.partition("/")[2], Streams((b"\xef\xbb\xbf", *unnamed), done=False))
    assert (await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),)))).text == "Yes."


@BOTH
async def test_the_limit_of_the_answer_is_passed_on(name: str, server: ModelServer, providers: Providers) -> None:
    await ask(server, providers, name, Prompt("", (UserTurn("?"),), max_output_tokens=64))
    [asked] = server.requests
    assert asked.body.get("max_completion_tokens", asked.body.get("max_tokens")) == 64


async def test_claude_gets_the_largest_limit_that_it_names(server: ModelServer, providers: Providers) -> None:
    message = "max_tokens: 90000 > 8192, which is the maximum allowed number of output tokens for claude-haiku-5-5"
    refusal = Refuses(400, {"type": "error", "error": {"type": "invalid_request_error", "message": message}})
    server.script(ANTHROPIC.partition("/")[2], refusal)
    await ask(server, providers, ANTHROPIC, Prompt("", (UserTurn("?"),), max_output_tokens=90000))
    assert [request.body["max_tokens"] for request in server.requests] == [90000, 8192]


async def test_thoughts_of_claude_go_back_with_their_calls_and_to_no_other_model(
    server: ModelServer, providers: Providers
) -> None:
    thought = {"type": "thinking", "thinking": "A forecast?", "signature": "c2ln"}
    hidden = {"type": "redacted_thinking", "data": "ZGF0YQ=="}
    unsigned = {"type": "thinking", "thinking": "Hm.", "signature": ""}
    call = {"type": "tool_use", "id": "t1", "name": "weather_now", "input": {"city": "Bern"}}
    said = {"type": "text", "text": "One moment."}
    ended = {"delta": {"stop_reason": "tool_use"}}
    server.script("claude-haiku-5-5", _anthropic({}, ended, thought, hidden, unsigned, said, call))
    asked = Prompt("", (UserTurn("Weather?"),), tools=(WEATHER,))
    first = await ask(server, providers, ANTHROPIC, asked)
    assert first.text == "One moment."
    turns = (UserTurn("Weather?"), AssistantTurn(first.text, first.calls, first.reasoning))
    for name, sent in ((ANTHROPIC, [thought, hidden]), ("anthropic/claude-opus-5", [])):
        answered = Prompt("", (*turns, ToolTurn(first.calls[0], "rain")), tools=(WEATHER,))
        await ask(server, providers, name, answered)
        assert server.requests[-1].body["messages"][1]["content"] == [*sent, said, call]
    server.script("claude-haiku-5-5", _anthropic({}, {}, thought, YES))
    assert (await ask(server, providers, ANTHROPIC, asked)).reasoning is None


async def test_an_id_of_another_models_call_is_one_that_claude_takes(server: ModelServer, providers: Providers) -> None:
    call = ToolCall("functions.weather:0", "weather.now", "{}")
    turns = (UserTurn("?"), AssistantTurn("", (call,)), ToolTurn(call, "sunny"))
    await ask(server, providers, ANTHROPIC, Prompt("", turns, tools=(WEATHER,)))
    _, called, result = server.requests[-1].body["messages"]
    assert called["content"][0]["id"] == result["content"][0]["tool_use_id"] == "functions_weather_0"


async def test_ids_that_a_server_repeats_are_different_ones_for_claude(
    server: ModelServer, providers: Providers
) -> None:
    turns: list[Turn] = [UserTurn("?")]
    for n, id_ in enumerate(("call.0", "call_0", "call.0", "call_0_1", "call.0")):
        call = ToolCall(id_, "weather.now", "{}")
        turns += [AssistantTurn("", (call,)), ToolTurn(call, f"{n}")]
    await ask(server, providers, ANTHROPIC, Prompt("", tuple(turns), tools=(WEATHER,)))
    blocks = [block for message in server.requests[-1].body["messages"][1:] for block in message["content"]]
    ids = [block["id"] for block in blocks if block["type"] == "tool_use"]
    assert ids[0] == "call_0"
    assert len(set(ids)) == len(ids) == 5
    assert [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"] == ids


async def test_the_results_of_several_calls_are_one_message_for_claude(
    server: ModelServer, providers: Providers
) -> None:
    calls = tuple(ToolCall(f"c{n}", "weather.now", "{}") for n in range(3))
    turns: list[Turn] = [UserTurn("?"), AssistantTurn("", calls), *(ToolTurn(call, call.id) for call in calls)]
    await ask(server, providers, ANTHROPIC, Prompt("", tuple(turns), tools=(WEATHER,)))
    results = server.requests[-1].body["messages"][-1]["content"]
    assert [(one["tool_use_id"], one["content"][0]["text"]) for one in results] == [(call.id,) * 2 for call in calls]


async def test_a_call_of_an_unknown_tool_keeps_its_name(server: ModelServer, providers: Providers) -> None:
    server.script("gpt-4o-mini", Says(calls=(("made_up", "{}"),)))
    answer = await ask(server, providers, OPENAI, Prompt("", (UserTurn("?"),), tools=(WEATHER,)))
    assert answer.calls == (ToolCall("call_0", "made_up", "{}"),)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


A = {"type": "object", "properties": {"kind": {"const": "a"}, "x": {}}, "required": ["kind", "x"]}
B = {"type": "object", "properties": {"kind": {"const": "b"}, "y": {}}, "required": ["kind"]}
N = {"type": "number"}
KIND = {"anyOf": [{"const": "a"}, {"const": "b"}]}
SCHEMAS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (of(tags={"type": "array"}), of(tags={"type": "array", "items": {}})),
    (of(a={"type": ["array", "null"]}), of(a={"type": ["array", "null"], "items": {}})),
    (of(a={"anyOf": [{"type": "array"}, B]}), of(a={"anyOf": [{"type": "array", "items": {}}, B]})),
    (
        of(a={"type": "array", "prefixItems": [{"type": "array"}]}),
        of(a={"type": "array", "items": {"type": "array", "items": {}}}),
    ),
    # One schema for each place, in each draft.
    *(
        (
            of(a={"type": "array", **given}),
            of(a={"type": "array", "items": {"anyOf": [{"type": "array", "items": {}}, N]}}),
        )
        for given in (
            {"items": [{"type": "array"}, N, N], "additionalItems": False},
            {"items": [{"type": "array"}], "additionalItems": N},
            {"prefixItems": [{"type": "array"}, N], "items": False},
            {"prefixItems": [{"type": "array"}], "items": N},
        )
    ),
    (of(a={"type": "array", "items": []}), of(a={"type": "array", "items": {}})),
    (
        of(a={}, b={}) | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}], "not": {"required": ["c"]}},
        of(a={}, b={}),
    ),
    ({"type": "object", "oneOf": [A, B, {"type": "null"}]}, of(kind=KIND, x={}, y={}) | {"required": ["kind"]}),
    (
        of(kind={"type": "string"}) | {"allOf": [A, {"allOf": [{"required": ["y"]}]}, True]},
        of(kind={"type": "string"}, x={}) | {"required": ["kind", "x", "y"]},
    ),
    ({"$ref": "#/definitions/A", "type": "object", "definitions": {"A": A}}, A | {"definitions": {"A": A}}),
    (
        {"type": "object", "anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": {"A": A, "B": B}},
        of(kind=KIND, x={}, y={}) | {"required": ["kind"], "$defs": {"A": A, "B": B}},
    ),
    (of(x={}) | {"allOf": [{"$ref": "#"}]}, of(x={})),
]


@BOTH
@pytest.mark.parametrize("n", range(len(SCHEMAS)))
async def test_the_schema_of_a_tool_is_one_that_providers_take(
    name: str, n: int, server: ModelServer, providers: Providers
) -> None:
    given, sent = SCHEMAS[n]
    kept = msgspec.json.encode(given)
    await ask(server, providers, name, Prompt("", (UserTurn("?"),), tools=(Tool("f", "", given),)))
    [tool] = server.requests[-1].body["tools"]
    assert (tool["function"]["parameters"] if name == OPENAI else tool["input_schema"]) == sent
    # The arguments are checked against the whole schema.
    assert msgspec.json.encode(given) == kept


@pytest.mark.parametrize(
    "schema",
    [
        of(a={"type": "array"}) | {"allOf": [of(**{f"p{n}": {} for n in range(400)})] * 400},  # too much work
        {"type": "object", "allOf": 7},
        {"type": "object", "anyOf": [7]},
        {"type": "object", "properties": [{"type": "array"}], "allOf": [of()]},
        {"type": "object", "$ref": "https://a.example/schema"},
    ],
)
def test_a_schema_that_cannot_be_merged_stays(schema: dict[str, Any]) -> None:
    assert tool_schema(schema) is schema


async def test_an_open_schema_is_sent_unchanged(server: ModelServer, providers: Providers) -> None:
    open_ = {"type": "object", "properties": {}}
    closed = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    for schema, strict in (
        (open_, False),
        (closed | {"properties": {"a": open_}}, False),
        (closed | {"additionalProperties": False}, True),
    ):
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("Hi"),), output_schema=schema))
        sent = server.requests[-1].body["response_format"]["json_schema"]
        assert (sent["schema"], sent["strict"]) == (schema, strict)


@pytest.mark.parametrize("place", ["$defs", "definitions"])
async def test_the_part_that_the_root_of_a_schema_refers_to_is_sent_at_the_root(
    server: ModelServer, providers: Providers, place: str
) -> None:
    node = f"#/{place}/node"
    properties = {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": node}}}
    closed = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    # One that is not strict has the type, too.
    for type_ in ({}, {"type": "object"}):
        schema = {"$ref": node, place: {"node": closed}, **type_}
        await ask(server, providers, OPENAI, Prompt("", (UserTurn("Hi"),), output_schema=schema))
        sent = server.requests[-1].body["response_format"]["json_schema"]["schema"]
        assert {name: sent.get(name) for name in ("$ref", *closed)} == {"$ref": None, **closed}
        assert sent[place]["node"]["properties"]["name"] == {"type": "string"}


@BOTH
async def test_a_required_call_and_single_calls_are_sent_as_options(
    name: str, server: ModelServer, providers: Providers
) -> None:
    prompt = Prompt("", (UserTurn("Hi"),), tools=(WEATHER,))
    await ask(server, providers, name, prompt)
    await ask(server, providers, name, msgspec.structs.replace(prompt, must_call=True, parallel=False))
    free, bound = (request.body for request in server.requests)
    assert "parallel_tool_calls" not in free
    if name == OPENAI:
        assert (free["tool_choice"], bound["tool_choice"], bound["parallel_tool_calls"]) == ("auto", "required", False)
    else:
        assert (free["tool_choice"], bound["tool_choice"]) == (
            {"type": "auto"},
            {"type": "any", "disable_parallel_tool_use": True},
        )
    sampling = Sampling(temperature=1.5, top_p=0.5, stop=("\n", "Human:"), seed=7)
    await ask(server, providers, name, msgspec.structs.replace(prompt, sampling=sampling))
    body = server.requests[-1].body
    if name == OPENAI:
        assert (body["temperature"], body["top_p"], body["stop"], body["seed"]) == (1.5, 0.5, ["\n", "Human:"], 7)
    else:
        # This model refuses both.
        assert ("temperature" in body, "top_p" in body, body["stop_sequences"]) == (False, False, ["Human:"])
        older = "anthropic/claude-haiku-4-5"
        await ask(server, providers, older, msgspec.structs.replace(prompt, sampling=sampling))
        assert (server.requests[-1].body["temperature"], "top_p" in server.requests[-1].body) == (1.0, False)
    # Without tools the options for tools are absent, because some servers refuse them.
    await ask(server, providers, name, Prompt("", (UserTurn("Hi"),), must_call=True, parallel=False))
    assert {"tool_choice", "parallel_tool_calls"}.isdisjoint(server.requests[-1].body)
