"""Servers that have the shape of OpenAI and not its details."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx2
import msgspec
import pytest

from infra.errors import TooLarge
from infra.outgoing import shares
from infra.outgoing.client import Outgoing
from services.agent.models import chat, pieces
from services.agent.models.completions import _Repair, usage
from services.agent.models.contract import (
    AssistantTurn,
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    Prompt,
    Reasoning,
    Sampling,
    Tool,
    ToolCall,
    ToolTurn,
    Turn,
    Usage,
    UserTurn,
)
from services.agent.models.pieces import LINES_A_SECOND, LINES_A_TURN, MAX_CALLS, MAX_FIELDS, WholeEvents
from services.agent.models.providers import Providers
from services.agent.models.thoughts import HELD, Thoughts, without_thoughts
from tooling.testing.model_server import KEY, ModelServer, Refuses, Says, Streams, model_server

MODEL = "gpt-4o-mini"
PROMPT = Prompt("", (UserTurn("?"),), tools=(Tool("add", "", {"type": "object", "properties": {}}),))


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


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    base = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return base | {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}]} | more


def text(*pieces: str, finish: str | None = "stop", **more: Any) -> Streams:
    ends = (chunk(finish=finish),) if finish else ()
    return Streams((*(chunk({"content": piece}, **more) for piece in pieces), *ends))


def call(index: int | None, id_: str | None, name: str | None, arguments: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if index is not None:
        made["index"] = index
    if id_ is not None:
        made["id"] = id_
    return made


async def ask(
    server: ModelServer, providers: Providers, prompt: Prompt = PROMPT, streamed: list[str] | None = None
) -> ModelAnswer:
    async def receive(piece: str) -> None:
        if streamed is not None:
            streamed.append(piece)

    return await providers.model(f"openai/{MODEL}", ModelEndpoint(server.url, KEY)).answer(prompt, receive)


def total(prompt: Any, completion: Any, **more: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **more}


@pytest.mark.parametrize(
    "stream",
    [
        Streams(
            (
                *(chunk({"content": "a"}, usage=total(10, n)) for n in (1, 2, 3)),
                chunk(finish="stop", usage=total(10, 3)),
            )
        ),
        Streams(
            (
                chunk({"content": "aaa"}),
                chunk(finish="stop", usage=total(10, 3)),
                chunk(usage=total(10, 3)) | {"choices": []},
            )
        ),
        Streams((chunk({"content": "aaa"}), chunk(finish="stop"), {"usage": total("10", "3")})),
        # A later null or zero does not take back the reported usage.
        Streams((chunk({"content": "aaa"}, usage=total(10, 3)), chunk(finish="stop", usage=None))),
        Streams((chunk({"content": "aaa"}, usage=total(10, 3)), chunk(finish="stop", usage=total(10, 0)))),
        Streams((chunk({"content": "aaa"}), chunk(finish="stop", usage=total(10, 3))), done=False),
        # Input at the start and output at the end, as in Anthropic's streams.
        Streams(
            (
                chunk({"content": "aaa"}, usage={"prompt_tokens": 10}),
                chunk(finish="stop", usage={"completion_tokens": 3}),
            )
        ),
    ],
)
async def test_running_totals_of_the_usage_count_once(
    server: ModelServer, providers: Providers, stream: Streams
) -> None:
    server.script(MODEL, stream)
    answer = await ask(server, providers)
    assert (answer.text, answer.usage.input_tokens, answer.usage.output_tokens) == ("aaa", 10, 3)


@pytest.mark.parametrize(
    ("given", "cached"),
    [
        (total(100, 5, prompt_cache_hit_tokens=90, prompt_cache_miss_tokens=10), 90),
        (total(100, 5, cached_tokens=90), 90),
        (total(100, 5, prompt_tokens_details={"cached_tokens": 90}, cached_tokens=7), 90),
        (total(100, 5, prompt_tokens_details=None, cache_read_input_tokens=0), 0),
        (total(100, 5, prompt_tokens_details={"cached_tokens": None}), None),
        # More cached tokens than tokens: all are charged as input.
        (total(100, 5, cached_tokens=190), None),
        ({"input_tokens": 100, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 90}}, 90),
        # Anthropic's names: the cached input is beside the other.
        ({"input_tokens": 4, "output_tokens": 5, "cache_read_input_tokens": 90, "cache_creation_input_tokens": 6}, 90),
        ({"input_tokens": 0, "output_tokens": 5, "cache_read_input_tokens": 100}, 100),
        (total(10, 5, total_tokens=105, cache_read_input_tokens=90), 90),
        (total(100, 5, total_tokens=105, cache_read_input_tokens=90), 90),
    ],
)
async def test_cached_tokens_are_found_in_the_fields_of_vendors(
    server: ModelServer, providers: Providers, given: dict[str, Any], cached: int | None
) -> None:
    server.script(MODEL, Streams((chunk({"content": "a"}), chunk(finish="stop", usage=given))))
    answer = await ask(server, providers)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (100, 5)
    assert answer.usage.cached_tokens == cached


@pytest.mark.parametrize(
    ("given", "output", "thoughts"),
    [
        # A part of the output, as OpenAI reports it.
        (total(10, 60, total_tokens=70, completion_tokens_details={"reasoning_tokens": 50}), 60, 50),
        # Beside the output.
        (total(10, 3, total_tokens=113, completion_tokens_details={"reasoning_tokens": 100}), 103, 100),
        (total(10, 60, total_tokens=120, completion_tokens_details={"reasoning_tokens": 50}), 110, 50),
        (total(10, 0, completion_tokens_details={"reasoning_tokens": 60}), 60, 60),
        # In the total only.
        (total(10, 3, total_tokens=113), 103, 100),
        # The rest of the total is cached input.
        (total(10, 3, total_tokens=113, cached_tokens=100), 3, None),
    ],
)
async def test_thoughts_that_are_reported_beside_the_output_are_charged(
    server: ModelServer, providers: Providers, given: dict[str, Any], output: int, thoughts: int | None
) -> None:
    server.script(MODEL, Streams((chunk({"content": "a"}), chunk(finish="stop", usage=given))))
    found = (await ask(server, providers)).usage
    assert (found.input_tokens, found.output_tokens, found.reasoning_tokens) == (10, output, thoughts)


def raw(content: str) -> bytes:
    """A chunk with these characters of JSON in its text, which may be no valid JSON."""
    return b'data: {"choices":[{"index":0,"delta":{"content":"%s"}}]}\n\n' % content.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ((raw("a\\ud83d"), raw("\\ude00b")), "a😀b"),
        ((raw("a\\ud83d"), chunk({"role": "assistant"}), raw("\\ude00b")), "a😀b"),
        ((raw("a\\ud83d"), raw("b")), "a�b"),
        ((raw("a\\ude00b"),), "a�b"),
        ((raw("a\udcffb"),), "a�b"),
        ((b"\xef\xbb\xbf" + raw("a"), raw("b")), "ab"),
        (({"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]},), "a"),
        ((raw("a"), {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}), "a"),
        (({"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]},), "a"),
        ((raw("a"), {"choices": [{"index": 1, "delta": {"content": "b"}}]}), "a"),
        # An event of several lines, and events without an empty line between them.
        ((b'data: {"choices":\ndata:  [{"delta":\r\ndata: {"content": "ab"}}]}\r\n\r\n',), "ab"),
        ((raw("a").rstrip() + b"\n" + raw("b"),), "ab"),
    ],
)
async def test_odd_chunks_are_read(
    server: ModelServer, providers: Providers, chunks: tuple[dict[str, Any] | bytes, ...], expected: str
) -> None:
    server.script(MODEL, Streams((*chunks, chunk(finish="stop"))))
    streamed: list[str] = []
    assert (await ask(server, providers, streamed=streamed)).text == "".join(streamed) == expected


async def test_an_answer_that_ends_with_an_error_is_none(server: ModelServer, providers: Providers) -> None:
    server.script(MODEL, Streams((chunk({"content": "Half"}), chunk(finish="error"))))
    with pytest.raises(ModelFailed, match="failed during the answer") as failed:
        await ask(server, providers)
    assert failed.value.transient


async def test_a_refusal_is_the_text_of_an_answer_without_another(server: ModelServer, providers: Providers) -> None:
    refused = chunk({"content": None, "refusal": "I cannot "}), chunk({"refusal": "do that."})
    streamed: list[str] = []
    for start in ((), (chunk({"content": "Yes."}),)):
        server.script(MODEL, Streams((*start, *refused, chunk(finish="stop", usage=total(10, 3)))))
        answer = await ask(server, providers, streamed=streamed)
        expected = ("Yes.", "stop") if start else ("I cannot do that.", "refusal")
        assert (answer.text, answer.finish_reason, answer.usage.output_tokens) == (*expected, 3)
    assert "".join(streamed) == "I cannot do that.Yes."


@pytest.mark.parametrize(
    "given",
    [
        None,
        {},
        [],
        total(10, None),
        {"prompt_tokens": 10},
        total(-1, 5),
        total(10, -5),
        total(0, 0),
        total(0, 5),
        total(1.5, 5),
        total(True, 5),
        total(10, 10**9),
        total("ten", 5),
        total(None, None, total_tokens=7),
        {"usage": total(10, 5)},
        {"total": total(10, 5)},
    ],
)
async def test_an_implausible_usage_is_not_reported_and_never_zero(
    server: ModelServer, providers: Providers, given: Any
) -> None:
    server.script(MODEL, Streams((chunk({"content": "a"}), chunk(finish="stop", usage=given))))
    assert (await ask(server, providers)).usage == Usage()
    assert usage(given) is None


async def test_zero_output_of_an_answer_with_content_is_not_reported(server: ModelServer, providers: Providers) -> None:
    server.script(MODEL, Streams((chunk({"content": "a"}), chunk(finish="stop", usage=total(10, 0)))))
    assert (await ask(server, providers)).usage == Usage()
    server.script(MODEL, Streams((chunk({"content": ""}), chunk(finish="stop", usage=total(10, 0)))))
    assert (await ask(server, providers)).usage.output_tokens == 0


def two(first: dict[str, Any], second: dict[str, Any], finish: str | None = "tool_calls") -> Streams:
    return Streams(
        (chunk({"tool_calls": [first]}), chunk({"tool_calls": [second]}), *((chunk(finish=finish),) if finish else ()))
    )


@pytest.mark.parametrize(
    "stream",
    [
        two(call(0, "a", "add", '{"n":1}'), call(0, "b", "add", '{"n":2}')),
        two(call(0, "a", "add", '{"n":1}'), call(1, "a", "add", '{"n":2}')),
        two(call(0, "a", "add", '{"n":1}'), call(0, "a", "add", '{"n":2}')),
        two(call(None, "a", "add", '{"n":1}'), call(None, "b", "add", '{"n":2}')),
        two(call(None, None, "add", '{"n":1}'), call(None, None, "add", '{"n":2}')),
        two(call(0, "a", "add", {"n": 1}), call(0, "b", "add", {"n": 2})),
        # In turns under one index.
        Streams(
            (
                *(chunk({"tool_calls": [call(0, id_, "add", "")]}) for id_ in "ab"),
                chunk({"tool_calls": [call(0, "a", None, '{"n":1}')]}),
                chunk({"tool_calls": [call(0, "b", None, '{"n":2}')]}),
                chunk(finish="tool_calls"),
            )
        ),
        two(call(0, "a", "add", '{"n":1}'), call(0, "b", "add", '{"n":2}'), finish=None),
        Streams((chunk({"tool_calls": [call(0, "a", "add", '{"n":1}'), call(0, "b", "add", '{"n":2}')]}, "stop"),)),
    ],
)
async def test_two_calls_that_share_an_index_or_an_id_are_two_calls(
    server: ModelServer, providers: Providers, stream: Streams
) -> None:
    server.script(MODEL, stream, Says("Done."))
    answer = await ask(server, providers)
    assert [(made.name, msgspec.json.decode(made.arguments)) for made in answer.calls] == [
        ("add", {"n": 1}),
        ("add", {"n": 2}),
    ]
    assert len({made.id for made in answer.calls}) == 2
    # The next request is one that a strict server takes.
    turns: tuple[Turn, ...] = (
        UserTurn("?"),
        AssistantTurn("", answer.calls),
        *(ToolTurn(made, "1") for made in answer.calls),
    )
    assert (await ask(server, providers, Prompt("", turns, tools=PROMPT.tools))).text == "Done."


async def test_calls_without_ids_get_other_ids_in_each_answer(server: ModelServer, providers: Providers) -> None:
    stream = two(call(0, None, "add", "{}"), call(1, "", "add", "{}"))
    server.script(MODEL, stream, stream)
    answers = [await ask(server, providers) for _ in range(2)]
    assert len({made.id for answer in answers for made in answer.calls}) == 4


@pytest.mark.parametrize(
    "pieces",
    [
        [call(0, "a", "add", ""), call(0, None, None, '{"n"'), call(0, "", None, ":1}")],
        [call(None, "a", "add", '{"n"'), call(None, None, None, ":1}")],
        # The name and the id in each piece.
        [call(0, "a", "add", '{"n"'), call(0, "a", "add", ":1"), call(0, "a", "add", "}"), call(0, "a", "add", "")],
        # Each piece with an index of its own.
        [call(0, "a", "add", '{"n"'), call(1, None, None, ":1"), call(2, "", None, "}")],
    ],
)
async def test_the_pieces_of_one_call_are_one_call(
    server: ModelServer, providers: Providers, pieces: list[dict[str, Any]]
) -> None:
    server.script(MODEL, Streams((*(chunk({"tool_calls": [piece]}) for piece in pieces), chunk(finish="tool_calls"))))
    answer = await ask(server, providers)
    assert [(made.id, made.name, made.arguments) for made in answer.calls] == [("a", "add", '{"n":1}')]


@pytest.mark.parametrize("finish", [None, ""])
async def test_a_complete_answer_without_a_finish_reason_is_complete(
    server: ModelServer, providers: Providers, finish: str | None
) -> None:
    chunks = (chunk({"content": "All "}, finish), chunk({"content": "of it."}, finish))
    server.script(MODEL, Streams((*chunks, chunk(usage=total(10, 3)) | {"choices": []})))
    answer = await ask(server, providers)
    assert (answer.text, answer.usage.output_tokens, answer.finish_reason) == ("All of it.", 3, "stop")
    # Without the end of the stream it was cut off.
    server.script(MODEL, Streams(chunks, done=False))
    with pytest.raises(ModelFailed) as failed:
        await ask(server, providers)
    assert failed.value.transient


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
async def test_thoughts_in_a_field_go_back_with_their_calls_and_nowhere_else(
    server: ModelServer, providers: Providers, field: str
) -> None:
    thoughts = (chunk({field: "They want "}), chunk({field: "a sum."}))
    calls = (chunk({"tool_calls": [call(0, "a", "add", "{}")]}), chunk(finish="tool_calls"))
    server.script(MODEL, Streams((*thoughts, *calls)), Says("3"), Streams((*thoughts, *text("Hi").chunks)))
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    sender = f"openai/{MODEL} 127.0.0.1"
    assert (answer.text, streamed, answer.reasoning) == ("", [], Reasoning(field, "They want a sum.", sender))
    turns = (UserTurn("?"), AssistantTurn("", answer.calls, answer.reasoning), ToolTurn(answer.calls[0], "3"))
    await ask(server, providers, Prompt("", turns, tools=PROMPT.tools))
    sent = server.requests[-1].body["messages"][1]
    assert (sent["role"], sent[field], sent["tool_calls"][0]["id"]) == ("assistant", "They want a sum.", "a")
    plain = await ask(server, providers)
    assert (plain.text, plain.reasoning) == ("Hi", None)


@pytest.mark.parametrize(
    "message",
    [
        "thinking is enabled but reasoning_content is missing in assistant tool call message at index 1",
        "The `reasoning_content` in the thinking mode must be passed back to the API.",
        "Missing `reasoning_content` field in the assistant message at message index 1",
    ],
)
async def test_thoughts_that_a_server_misses_are_blank_from_then_on(
    server: ModelServer, providers: Providers, message: str
) -> None:
    server.script(MODEL, Refuses(400, {"error": {"message": message, "type": "invalid_request_error"}}))
    sender = f"openai/{MODEL} 127.0.0.1"
    others, own = (Reasoning("reasoning_content", "a sum", model) for model in ("openai/other b.example", sender))
    turns: list[Turn] = [UserTurn("?")]
    for n, thoughts in enumerate((None, others, own)):
        made = ToolCall(f"c{n}", "add", "{}")
        turns += [AssistantTurn("", (made,), thoughts), ToolTurn(made, "3")]
    for _ in range(2):
        await ask(server, providers, Prompt("", tuple(turns), tools=PROMPT.tools))
    sent = [[m.get("reasoning_content") for m in request.body["messages"][1::2]] for request in server.requests]
    # Kimi takes an empty text for a missing one.
    assert sent == [[None, None, "a sum"], [" ", " ", "a sum"], [" ", " ", "a sum"]]


async def test_a_server_that_wants_a_text_beside_calls_gets_an_empty_one_from_then_on(
    server: ModelServer, providers: Providers
) -> None:
    detail = {"type": "string_type", "loc": ["body", "messages", 1, "content"], "msg": "Input should be a valid string"}
    server.script(MODEL, Refuses(422, {"detail": [detail]}))
    made = ToolCall("c1", "add", "{}")
    turns = (UserTurn("?"), AssistantTurn("", (made,)), ToolTurn(made, "3"))
    for _ in range(2):
        await ask(server, providers, Prompt("", turns, tools=PROMPT.tools))
    assert [request.body["messages"][1]["content"] for request in server.requests] == [None, "", ""]


DETAILS: list[dict[str, Any]] = [
    {"type": "reasoning.text", "text": "They want ", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.text", "text": "a sum.", "signature": None, "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.text", "signature": "Et8B", "format": "anthropic-claude-v1", "index": 0},
    {"type": "reasoning.encrypted", "data": "AbC=", "id": "a", "format": "google-gemini-v1", "index": 0},
    {"type": "reasoning.encrypted", "data": "DeF=", "id": "b", "format": "google-gemini-v1", "index": 0},
]


@pytest.mark.parametrize("field", [None, "reasoning"])
async def test_parts_of_thoughts_go_back_whole(server: ModelServer, providers: Providers, field: str | None) -> None:
    thoughts = {field: "They want a sum."} if field else {}
    chunks = [chunk({"reasoning_details": "hm", **thoughts}), *(chunk({"reasoning_details": [one]}) for one in DETAILS)]
    calls = (chunk({"tool_calls": [call(0, "a", "add", "{}")]}), chunk(finish="tool_calls"))
    server.script(MODEL, Streams((*chunks, *calls)), Says("3"))
    answer = await ask(server, providers)
    answer = msgspec.json.decode(msgspec.json.encode(answer), type=ModelAnswer)
    turns = (UserTurn("?"), AssistantTurn("", answer.calls, answer.reasoning), ToolTurn(answer.calls[0], "3"))
    await ask(server, providers, Prompt("", turns, tools=PROMPT.tools))
    sent = server.requests[-1].body["messages"][1]
    assert sent["reasoning_details"] == [DETAILS[0] | {"text": "They want a sum.", "signature": "Et8B"}, *DETAILS[3:]]
    assert {name: sent.get(name) for name in ("reasoning", "reasoning_content")} == {
        "reasoning": thoughts.get("reasoning"),
        "reasoning_content": None,
    }


SIGNATURE = {"extra_content": {"google": {"thought_signature": "AbC="}}}


@pytest.mark.parametrize("later", [False, True])
async def test_the_own_fields_of_a_call_go_back_to_its_model_and_to_no_other(
    server: ModelServer, providers: Providers, later: bool
) -> None:
    first = call(0, "a", "add", "{}") | ({} if later else SIGNATURE) | {"token_ids": None}
    pieces = ([first], [{"index": 0} | SIGNATURE]) if later else ([first],)
    chunks = (chunk({"tool_calls": piece}) for piece in pieces)
    server.script(MODEL, Streams((*chunks, chunk(finish="tool_calls"))), Says("3"))
    answer = await ask(server, providers)
    # As it is stored.
    answer = msgspec.json.decode(msgspec.json.encode(answer), type=ModelAnswer)
    turns = (UserTurn("?"), AssistantTurn("", answer.calls), ToolTurn(answer.calls[0], "3"))
    prompt = Prompt("", turns, tools=PROMPT.tools)
    await ask(server, providers, prompt)
    made = {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    assert server.requests[-1].body["messages"][1]["tool_calls"] == [made | SIGNATURE]

    async def hear(_: str) -> None:
        """Drops a text."""

    await providers.model("openai/other", ModelEndpoint(server.url, KEY)).answer(prompt, hear)
    assert server.requests[-1].body["messages"][1]["tool_calls"] == [made]


async def test_too_large_fields_of_a_call_are_not_kept(server: ModelServer, providers: Providers) -> None:
    made = call(0, "a", "add", "{}") | {"extra_content": "x" * chat.MAX_EXTRA_BYTES}
    server.script(MODEL, Streams((chunk({"tool_calls": [made]}), chunk(finish="tool_calls"))))
    assert (await ask(server, providers)).calls == (ToolCall("a", "add", "{}"),)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Tool call id was functions.add:0 but must be a-z, A-Z, 0-9, with a length of 9."),
        (500, "Tool call id was functions.add:0 but must be a-z, A-Z, 0-9, with a length of 9."),
        (400, "Invalid 'messages[1].tool_calls[0].id': string too long. Expected a string with maximum length 40."),
    ],
)
async def test_ids_of_calls_that_a_server_refuses_are_short_from_then_on(
    server: ModelServer, providers: Providers, status: int, message: str
) -> None:
    server.script(MODEL, Refuses(status, {"object": "error", "message": message, "type": "invalid_function_call"}))
    calls = ToolCall("functions.add:0", "add", "{}"), ToolCall("aB3xK9mP2", "add", "{}")
    turns: tuple[Turn, ...] = (UserTurn("?"), AssistantTurn("", calls), *(ToolTurn(one, "3") for one in calls))
    for _ in range(2):
        await ask(server, providers, Prompt("", turns, tools=PROMPT.tools))
    sent = [request.body["messages"] for request in server.requests]
    assert len(sent) == 3
    for _, said, *results in sent[1:]:
        ids = [one["id"] for one in said["tool_calls"]]
        assert ids == [result["tool_call_id"] for result in results]
        assert re.fullmatch("[a-zA-Z0-9]{9}", ids[0])
        assert ids[1] == "aB3xK9mP2"


@pytest.mark.parametrize(
    "pieces",
    [
        ["<think>they are angry</think>Hello"],
        ["<think>they", " are ang", "ry</thi", "nk>Hello"],
        list("<think>they are angry</think>\n\nHello"),
        ["they are angry</think>Hello"],
        ["they are angry", "\n</think>\n", "\nHello"],
        ["\n<thinking>\nthey are angry\n</thinking>\n\nHello"],
        ["<think></think>Hel", "lo"],
        ["<think>a</think>\n<think>b</think>Hello"],
        ["<THINK>they are angry</Think>Hello"],
        ["they are angry</THINK>Hello"],
        ["<seed:th", "ink>they are angry</seed:think>Hello"],
        ["[THINK]they are angry[/THINK]Hello"],
        ["<think>they <think>are</think> angry</think>Hello"],
        ["<think>they ", "<thi", "nk>are</think> ang", *("ry " * 100), "\n</think>\n", "Hello"],
        ["◁think▷they are angry◁/think▷Hello"],
        ["<|START_THINKING|>they are angry<|END_THINKING|>Hello"],
        ["<|begin_of_thought|>they are angry<|end_of_thought|>Hello"],
        ["<scratchpad>they are angry</scratchpad>Hello"],
        ["<antThinking>they are ", "angry</antThinking>Hello"],
        ["<|start|>assistant<|channel|>analysis<|message|>they are angry<|end|><|channel|>final<|message|>Hello"],
        ["<|channel|>analysis<|message|>they are angry<|end|>", "<|start|>assistant<|channel|>final<|message|>Hello"],
    ],
)
async def test_thoughts_in_tags_are_neither_streamed_nor_in_the_answer(
    server: ModelServer, providers: Providers, pieces: list[str]
) -> None:
    server.script(MODEL, text(*pieces))
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    assert ("".join(streamed), answer.text) == ("Hello", "Hello")


@pytest.mark.parametrize(
    "words",
    [
        "The tag <think> is no HTML, and </think> neither.",
        "Between <think>and</think> stand thoughts.",
        "Write `</think>` to close it.",
        "a <thinker> thinks",
        "<b>bold</b> and </p>",
        "[thinking aloud] no",
        "<",
        "<thin",
        "",
        "Long " * 100,
    ],
)
async def test_tags_in_a_sentence_stay(server: ModelServer, providers: Providers, words: str) -> None:
    server.script(MODEL, text(words), text(*words) if words else text(""))
    for _ in range(2):
        streamed: list[str] = []
        answer = await ask(server, providers, streamed=streamed)
        assert ("".join(streamed), answer.text) == (words, words)


async def test_thoughts_after_the_first_words_are_removed(server: ModelServer, providers: Providers) -> None:
    said = "Hello.\n<think>they are angry</think>Goodbye."
    server.script(MODEL, text(said), text(*said))
    for _ in range(2):
        streamed: list[str] = []
        answer = await ask(server, providers, streamed=streamed)
        assert ("".join(streamed), answer.text) == ("Hello.\nGoodbye.", "Hello.\nGoodbye.")


async def test_long_thoughts_without_an_opening_tag_are_removed_and_next_time_held_back(
    server: ModelServer, providers: Providers
) -> None:
    pieces = [*(f"thought {n} " for n in range(30)), "end.</think>", "Hello"]
    server.script(MODEL, text(*pieces), text(*pieces), text("No thoughts here, just words. " * 10))
    assert (await ask(server, providers)).text == "Hello"
    streamed: list[str] = []
    assert (await ask(server, providers, streamed=streamed)).text == "Hello"
    assert streamed == ["Hello"]
    assert (await ask(server, providers)).text == "No thoughts here, just words. " * 10


def event(**delta: Any) -> bytes:
    return b"data: " + msgspec.json.encode(chunk(delta)) + b"\n\n"


COUNT = 40_000
LONG_STREAMS: dict[str, tuple[int | None, list[bytes]]] = {
    "a line in single bytes": (HELD, [b"data: ", *([b"x"] * 400_000)]),
    "white space": (HELD, [event(content=" " * 100)] * 10_000),
    "a text that may be thoughts": (None, [event(content="word")] * COUNT),
    "ends of tags": (HELD, [event(content="word " * 20), *([event(content="</ ")] * COUNT)]),
    "calls": (
        HELD,
        [
            event(tool_calls=[call(n % MAX_CALLS, f"c{n % MAX_CALLS}", "add" if n < MAX_CALLS else None, "1")])
            for n in range(COUNT)
        ],
    ),
    "a call whose name is repeated": (
        HELD,
        [event(tool_calls=[call(0, "c", "add", '{"a":"' if n == 0 else "x" * 100)]) for n in range(COUNT)],
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", LONG_STREAMS)
async def test_a_long_stream_takes_linear_time(kind: str) -> None:
    """All tenants share the event loop, and the server is a tenant's. In quadratic time each takes more than 30 s."""
    held, pieces = LONG_STREAMS[kind]

    async def stream() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    async for _ in _Repair(Thoughts(held)).lines(stream()):
        pass


async def test_a_tenants_answers_have_so_many_lines_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's servers, which sent without a pause, kept the process busy: no other tenant got an answer."""
    clock = [100.0]

    wait = asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        await wait(0)

    monkeypatch.setattr(pieces, "sleep", sleep)
    monkeypatch.setattr(pieces, "monotonic", lambda: clock[0])

    async def read(tenant: str, count: int) -> float:
        """The seconds that the stream takes."""
        shares.work_for(tenant)
        began = clock[0]

        async def stream() -> AsyncIterator[bytes]:
            for _ in range(count // 100):
                yield b"data: 1\n\n" * 50

        assert len([line async for line in pieces.lines(stream())]) == count + 1
        return clock[0] - began

    # The first second's are free.
    assert await asyncio.create_task(read("hostile", 2 * LINES_A_SECOND)) == pytest.approx(1)
    assert await asyncio.create_task(read("other", LINES_A_SECOND)) == pytest.approx(0)
    assert await asyncio.create_task(read("hostile", LINES_A_SECOND)) == pytest.approx(1)
    clock[0] += 10
    assert await asyncio.create_task(read("hostile", LINES_A_SECOND)) == pytest.approx(0)


async def test_a_tenants_answers_leave_each_turn_of_the_event_loop_to_others() -> None:
    """In a process that had a tenth of a processor core, fifty endless answers kept each turn for seconds."""
    shares.work_for("endless")
    read = 0

    async def answer() -> None:
        nonlocal read

        async def endless() -> AsyncIterator[bytes]:
            while True:
                yield b"data: 1\n\n" * 5 * LINES_A_TURN

        async for _ in pieces.lines(endless()):
            read += 1

    answers = [asyncio.create_task(answer()) for _ in range(50)]
    for _ in range(100):
        before = read
        await asyncio.sleep(0)
        assert read - before <= 2 * LINES_A_TURN
    assert read >= 50 * LINES_A_TURN, "each turn has some"
    for task in answers:
        task.cancel()
    await asyncio.gather(*answers, return_exceptions=True)


class Sends(httpx2.AsyncBaseTransport, httpx2.AsyncByteStream):
    """A server whose stream comes in these pieces."""

    def __init__(self, pieces: list[bytes], type_: bytes = b"text/event-stream") -> None:
        self._pieces = pieces
        self._headers = [(b"content-type", type_)]

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers=self._headers, stream=self, request=request)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


async def _events(pieces: list[bytes]) -> list[bytes]:
    """The pieces that a library gets."""
    request = httpx2.Request("GET", "http://a.example")
    answer = await WholeEvents(Sends(pieces)).handle_async_request(request)
    return [piece async for piece in answer.aiter_raw()]


@pytest.mark.timeout(150)
async def test_a_library_gets_whole_events_of_few_lines() -> None:
    assert await _events([b"event: a\nda", b"ta: 1\n", b"\ndata: 2\r\n\r\nrest"]) == [
        b"event: a\ndata: 1\n\n",
        b"data: 2\r\n\r\n",
        b"rest",
    ]
    long = [b"x"] * 300_000
    assert await _events(long) == [b"".join(long)]
    for end in (b"\n", b"\r"):
        with pytest.raises(TooLarge):
            await _events([b"a" + end] * 2_000)
    providers = Providers(Sends([b"a\n"] * 2_000))
    with pytest.raises(ModelFailed, match="lines"):
        await providers.model("anthropic/x", ModelEndpoint(base_url="http://a.example")).answer(PROMPT, _ignored)
    await providers.close()


async def _ignored(text: str) -> None:
    """Drops a text."""


MIB = 1024 * 1024
LARGE: dict[str, tuple[str, bytes, list[bytes]]] = {
    "one piece": ("openai/x", b"application/json", [b"[]," * MIB] * 2),
    "one line": ("openai/x", b"text/event-stream", [b"data: ", *[b"[]," * MIB] * 2]),
    "many lines": ("openai/x", b"text/event-stream", [b"data: [\n", *[b"data: [],\n" * 100_000] * 20]),
    "one event of anthropic": ("anthropic/x", b"text/event-stream", [b"data: " + b"x" * MIB + b"\n"] * 5),
}


@pytest.mark.parametrize("kind", LARGE)
async def test_a_large_part_of_an_answer_is_not_read(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lists it would take more than a gigabyte."""
    monkeypatch.setattr("services.agent.models.pieces.LINES_A_SECOND", 10**9)
    name, type_, pieces = LARGE[kind]
    providers = Providers(Sends(pieces, type_))
    with pytest.raises(ModelFailed, match="more than 4 MiB") as failed:
        await providers.model(name, ModelEndpoint(base_url="http://a.example")).answer(PROMPT, _ignored)
    assert not failed.value.transient
    await providers.close()


def _block(n: int) -> bytes:
    block = {"type": "tool_use", "id": f"t{n}", "name": "add", "input": {}}
    start = {"type": "content_block_start", "index": n, "content_block": block}
    stop = {"type": "content_block_stop", "index": n}
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (str(e["type"]).encode(), msgspec.json.encode(e)) for e in (start, stop)
    )


USAGE = {"input_tokens": 1, "output_tokens": 1}
MESSAGE = {"id": "m", "type": "message", "role": "assistant", "model": "x", "content": [], "usage": USAGE}
START = b"event: message_start\ndata: %s\n\n" % msgspec.json.encode({"type": "message_start", "message": MESSAGE})
# Each would take much more memory than its bytes.
MANY: dict[str, tuple[str, list[bytes]]] = {
    "calls": ("openai/x", [event(tool_calls=[call(n, f"c{n}", "add", "{}")]) for n in range(MAX_CALLS + 1)]),
    "fields of a call": (
        "openai/x",
        [event(tool_calls=[call(0, "c", "add", "{}") | {f"x{n}": n for n in range(MAX_FIELDS + 1)}])],
    ),
    "fields of the usage": (
        "openai/x",
        [b"data: " + msgspec.json.encode(chunk(usage={f"x{n}": n + 1 for n in range(MAX_FIELDS + 1)})) + b"\n\n"],
    ),
    "characters": ("openai/x", [event(content="x" * MIB)] * 9),
    "characters of thoughts": ("openai/x", [event(reasoning="x" * MIB)] * 9),
    "characters of arguments": ("openai/x", [event(tool_calls=[call(0, "c", "add", "x" * MIB)])] * 9),
    "characters of parts of thoughts": (
        "openai/x",
        [event(reasoning_details=[{"type": "reasoning.text", "text": "x" * MIB}])] * 9,
    ),
    "parts of thoughts": ("openai/x", [event(reasoning_details=[{"type": "a"}] * 10_000)] * 11),
    "parts of anthropic": ("anthropic/x", [START, *(_block(n) for n in range(MAX_CALLS + 2))]),
}


@pytest.mark.parametrize("kind", MANY)
async def test_an_answer_of_many_parts_is_not_read(kind: str) -> None:
    name, pieces = MANY[kind]
    providers = Providers(Sends(pieces))
    with pytest.raises(ModelFailed, match=r"(has|have) more than") as failed:
        await providers.model(name, ModelEndpoint(base_url="http://a.example")).answer(PROMPT, _ignored)
    assert not failed.value.transient
    await providers.close()


class _RefusesAtLength(Sends):
    """A server whose error answers have a megabyte."""

    read = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(400, headers={"content-type": "application/json"}, stream=self, request=request)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(16):
            self.read += 1
            yield b"x" * 65_536


@pytest.mark.parametrize("name", ["openai/x", "anthropic/x"])
async def test_of_a_long_error_answer_the_beginning_is_read(name: str) -> None:
    providers = Providers(sends := _RefusesAtLength([]))
    with pytest.raises(ModelFailed, match="HTTP 400"):
        await providers.model(name, ModelEndpoint(base_url="http://a.example")).answer(PROMPT, _ignored)
    assert sends.read == 1
    await providers.close()


def _of(delta: bytes) -> bytes:
    return b'{"choices":[{"delta":' + delta + b"}]}"


ODD = [
    *(b"[" * 100_000, b"[" * 3_000 + b"]" * 3_000, b"null", b'{"choices":["x",5,null]}', b'{"error":[1]}'),
    *(b'{"choices":[{"message":' + message + b"}]}" for message in (b"null", b'"x"', b'{"content":["a"]}')),
    b'{"choices":[{"message":{"tool_calls":[5,null,{"function":5}]}}]}',
    *(_of(delta) for delta in (b"[1]", b'"x"', b"5", b'{"content":5}', b'{"content":["a"],"reasoning":[1]}')),
    *(_of(b'{"tool_calls":[{"function":' + function + b"}]}") for function in (b'"x"', b"[1]", b'{"name":{"a":1}}')),
    *(_of(b'{"tool_calls":[{"id":' + id_ + b',"function":{"name":"add"}}]}') for id_ in (b"[1]", b'{"a":1}')),
    *(b'{"choices":[{"delta":{"content":5},"finish_reason":' + finish + b"}]}" for finish in (b'"stop"', b"[1]")),
]


@pytest.mark.parametrize("type_", [b"application/json", b"text/event-stream"])
async def test_any_value_in_any_place_is_read_or_malformed(type_: bytes) -> None:
    for content in ODD:
        providers = Providers(Sends([content if b"json" in type_ else b"data: " + content + b"\n\n"], type_))
        with suppress(ModelFailed):
            await providers.model("openai/x", ModelEndpoint(base_url="http://a.example")).answer(PROMPT, _ignored)
        await providers.close()


@pytest.mark.timeout(30)
def test_a_blank_answer_takes_linear_time() -> None:
    assert without_thoughts(" " * 200_000) == " " * 200_000


def test_thoughts_that_do_not_end_again_are_the_answer() -> None:
    thoughts = Thoughts(HELD)
    assert thoughts.feed("<think>the tag <think></think>Hello") + thoughts.flush() == "Hello"


def test_without_a_hold_nothing_is_held_back_but_an_opening_tag() -> None:
    thoughts = Thoughts(0)
    assert [thoughts.feed(piece) for piece in ("<", "th", "e")] == ["", "", "<the"]
    assert without_thoughts("they think</think> so") == "so"
    assert without_thoughts("<think> in a sentence</think> stays") == "<think> in a sentence</think> stays"


@pytest.mark.parametrize(
    "body",
    [
        {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]},
        {"error": {"message": "Unrecognized request argument supplied: stream_options"}},
    ],
)
@pytest.mark.parametrize("status", [400, 422])
async def test_an_option_that_is_refused_is_left_out_and_stays_out(
    server: ModelServer, providers: Providers, status: int, body: Any
) -> None:
    server.script(MODEL, Refuses(status, body), text("One"), text("Two"))
    answers = [await ask(server, providers) for _ in range(2)]
    assert [(answer.text, answer.usage) for answer in answers] == [("One", Usage()), ("Two", Usage())]
    assert ["stream_options" in request.body for request in server.requests] == [True, False, False]


async def test_a_value_that_is_refused_is_left_out_once(server: ModelServer, providers: Providers) -> None:
    refusal = {"error": {"message": "Unsupported value: 'temperature' does not support 0.2 with this model."}}
    server.script(MODEL, Refuses(400, refusal))
    sampling = Sampling(temperature=0.2, stop=("x",), max_output_tokens=5)
    for _ in range(2):
        await ask(server, providers, msgspec.structs.replace(PROMPT, sampling=sampling))
    bodies = [request.body for request in server.requests]
    assert [body.get("temperature") for body in bodies] == [0.2, None, 0.2]
    assert all((body["stop"], "max_output_tokens" in body) == (["x"], False) for body in bodies)


async def test_a_malformed_schema_of_a_client_goes_to_the_server_as_it_is(
    server: ModelServer, providers: Providers
) -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}, "b": {"required": True}}}
    await ask(server, providers, msgspec.structs.replace(PROMPT, tools=(Tool("add", "", schema),)))
    assert server.requests[-1].body["tools"][0]["function"]["parameters"] == schema


async def test_several_refused_options_are_left_out_and_a_limit_gets_its_newer_name(
    server: ModelServer, providers: Providers
) -> None:
    refusal = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server.script(
        MODEL,
        Refuses(400, {"error": {"message": refusal, "param": "max_tokens", "code": "unsupported_parameter"}}),
        Refuses(400, {"error": "parallel_tool_calls: unknown field, expected one of: stream_options, tool_choice"}),
        text("Yes"),
    )
    prompt = msgspec.structs.replace(PROMPT, max_output_tokens=7, parallel=False)
    for _ in range(2):
        await ask(server, providers, prompt)
    names = ("max_tokens", "max_completion_tokens", "parallel_tool_calls", "stream_options", "tool_choice")
    sent = [[name for name in names if name in request.body] for request in server.requests]
    assert sent[0] == ["max_tokens", *names[2:]]
    assert sent[2:] == [["max_completion_tokens", "stream_options", "tool_choice"]] * 2
    assert server.requests[-1].body["max_completion_tokens"] == 7


@pytest.mark.parametrize(
    ("message", "most"),
    [
        ("max_tokens is too large: 90000. This model supports at most 16384 completion tokens.", 16384),
        (
            "'max_tokens' or 'max_completion_tokens' is too large: 90000. This model's maximum context length is 4096 "
            "tokens and your request has 10 input tokens (90000 > 4096 - 10).",
            None,
        ),
        (
            "This model's maximum context length is 8192 tokens. However, you requested 90064 tokens (64 in the "
            "messages, 90000 in the completion). Please reduce the length of the messages or completion.",
            None,
        ),
        ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", 8192),
        ("<400> InternalError.Algo.InvalidParameter: Range of max_tokens should be [1, 8192]", 8192),
        (
            "The parameter `max_tokens` specified in the request is not valid: integer above maximum value, expected a "
            "value <= 12288, but got 90000 instead.",
            12288,
        ),
        ("max_tokens must be greater than or equal to 1 and less than or equal to `8192`", 8192),
        (
            "Unable to submit request because it has a maxOutputTokens value of 90000 but the supported range is from "
            "1 (inclusive) to 65537 (exclusive). Update the value and try again.",
            65536,
        ),
        (
            "Unable to submit request because it has a maxOutputTokens value of 90000 but the supported range is from "
            "1 (inclusive) to 65536 (inclusive). Update the value and try again.",
            65536,
        ),
        ("max_tokens: 90000 is not supported, the maximum is 4K", None),
        ("max_tokens", None),
    ],
)
async def test_a_limit_that_is_too_large_for_a_server_is_lowered_for_this_request(
    server: ModelServer, providers: Providers, message: str, most: int | None
) -> None:
    server.script(MODEL, Refuses(400, {"error": {"message": message, "type": "BadRequestError"}}))
    for limit in (90000, 50):
        await ask(server, providers, msgspec.structs.replace(PROMPT, max_output_tokens=limit))
    bodies = [request.body for request in server.requests]
    assert [body.get("max_tokens") for body in bodies] == [90000, most, 50]
    assert not any("max_completion_tokens" in body for body in bodies)


TOO_LARGE = (
    "Request too large for model `llama-3.3-70b-versatile` in organization `org_x` service tier `on_demand` on tokens "
    "per minute (TPM): Limit 6000, Requested 90020, please reduce your message size and try again."
)


@pytest.mark.parametrize("status", [413, 429])
async def test_a_limit_above_the_tokens_of_a_minute_is_left_out_once(
    server: ModelServer, providers: Providers, status: int
) -> None:
    refusal = Refuses(status, {"error": {"message": TOO_LARGE, "type": "tokens", "code": "rate_limit_exceeded"}})
    server.script(MODEL, refusal)
    limited = msgspec.structs.replace(PROMPT, max_output_tokens=90000)
    for _ in range(2):
        await ask(server, providers, limited)
    assert [request.body.get("max_tokens") for request in server.requests] == [90000, None, 90000]
    # Without a limit, and for another reason, it is final.
    server.script(MODEL, refusal, Refuses(status, {"error": {"message": "Rate limit reached: Limit 6000"}}))
    for prompt in (PROMPT, limited):
        with pytest.raises(ModelFailed, match="imit 6000") as failed:
            await ask(server, providers, prompt)
        assert failed.value.transient is (status == 429)
    assert len(server.requests) == 5


@pytest.mark.parametrize("host", ["api.openai.com", "eu.api.openai.com", "me.openai.azure.com", "generic.example"])
async def test_openai_gets_the_limit_by_its_newer_name(host: str) -> None:
    sent = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append(msgspec.json.decode(request.content))
        if len(sent) == 1:
            message = "max_tokens is too large: 90000. This model supports at most 16384 completion tokens."
            return httpx2.Response(400, json={"error": {"message": message, "param": "max_tokens"}})
        content = b"".join(b"data: %b\n\n" % msgspec.json.encode(one) for one in text("Hi").chunks)
        return httpx2.Response(200, content=content, headers={"content-type": "text/event-stream"})

    async def hear(_: str) -> None:
        """Drops a text."""

    providers = Providers(httpx2.MockTransport(answer))
    model = providers.model(f"openai/{MODEL}", ModelEndpoint(f"https://{host}/v1"))
    await model.answer(msgspec.structs.replace(PROMPT, max_output_tokens=90000), hear)
    await providers.close()
    name, other = ("max_tokens", "max_completion_tokens")[:: 1 if host == "generic.example" else -1]
    assert [(body[name], other in body) for body in sent] == [(90000, False), (16384, False)]


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "message",
    [
        "Invalid schema for response_format 'answer': In context=(), 'function' is not permitted.",
        "The provided JSON schema contains features not supported by xgrammar.",
        "failed to parse grammar",
        "Unknown name \"a\" at 'generation_config.response_schema.properties[0].value': Cannot find field.",
    ],
)
async def test_a_schema_that_is_refused_is_left_out_once(
    server: ModelServer, providers: Providers, message: str
) -> None:
    server.script(MODEL, Refuses(400, {"error": {"message": message}}))
    for _ in range(2):
        await ask(server, providers, msgspec.structs.replace(PROMPT, output_schema=OBJECT))
    assert ["response_format" in request.body for request in server.requests] == [True, False, True]


@pytest.mark.parametrize(
    "message",
    [
        "Function calling with a response mime type: 'application/json' is unsupported",
        "json mode cannot be combined with tool/function calling",
        "'response_format` json_object cannot be combined with tool/function calling",
        '"tools" is incompatible with "response_format"',
    ],
)
async def test_a_format_that_is_refused_beside_tools_is_left_out_beside_tools(
    server: ModelServer, providers: Providers, message: str
) -> None:
    server.script(MODEL, Refuses(400, [{"error": {"code": 400, "message": message, "status": "INVALID_ARGUMENT"}}]))
    with_tools = msgspec.structs.replace(PROMPT, output_schema=OBJECT)
    for prompt in (with_tools, with_tools, msgspec.structs.replace(with_tools, tools=())):
        await ask(server, providers, prompt)
    assert [("tools" in request.body, "response_format" in request.body) for request in server.requests] == [
        (True, True),
        (True, False),
        (True, False),
        (False, True),
    ]


async def test_a_format_that_a_model_does_not_know_stays_out(server: ModelServer, providers: Providers) -> None:
    message = "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model."
    server.script(MODEL, Refuses(400, {"error": {"message": message, "param": "response_format"}}))
    for _ in range(2):
        await ask(server, providers, msgspec.structs.replace(PROMPT, output_schema=OBJECT))
    assert ["response_format" in request.body for request in server.requests] == [True, False, False]


async def test_an_option_stays_out_only_if_that_has_helped(server: ModelServer, providers: Providers) -> None:
    # The error repeats the words of a person.
    refusal = Refuses(422, {"detail": [{"loc": ["body", "messages"], "input": "unknown option seed"}]})
    server.script(MODEL, refusal, refusal)
    prompt = msgspec.structs.replace(PROMPT, sampling=Sampling(seed=7))
    with pytest.raises(ModelFailed):
        await ask(server, providers, prompt)
    await ask(server, providers, prompt)
    assert [request.body.get("seed") for request in server.requests] == [7, None, 7]


@pytest.mark.parametrize("body", [{"error": {"message": "context too long"}}, {"error": {"message": "seed is fine"}}])
async def test_another_refusal_is_final(server: ModelServer, providers: Providers, body: Any) -> None:
    server.script(MODEL, Refuses(400, body), text("Never"))
    with pytest.raises(ModelFailed, match="HTTP 400") as failed:
        await ask(server, providers)
    assert not failed.value.transient
    assert len(server.requests) == 1


async def test_invalid_arguments_of_an_earlier_call_are_sent_as_an_empty_object(
    server: ModelServer, providers: Providers
) -> None:
    cut = ToolCall("a", "add", '{"n":')
    await ask(
        server,
        providers,
        Prompt("", (UserTurn("?"), AssistantTurn("", (cut,)), ToolTurn(cut, "Error: cut")), tools=PROMPT.tools),
    )
    assert server.requests[-1].body["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"


async def test_an_error_inside_the_stream_is_a_failure(server: ModelServer, providers: Providers) -> None:
    server.script(MODEL, Streams((chunk({"content": "Half"}), {"error": {"message": "busy", "code": 503}})))
    with pytest.raises(ModelFailed):
        await ask(server, providers)
    server.script(MODEL, text("Whole", error=None))
    assert (await ask(server, providers)).text == "Whole"


async def test_a_tool_is_converted_once(
    server: ModelServer, providers: Providers, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Any] = []

    def convert(schema: dict[str, Any]) -> dict[str, Any]:
        converted.append(schema)
        return schema

    monkeypatch.setattr(chat, "tool_schema", convert)
    schema = {"type": "object", "properties": {"once": {"type": "string"}}}
    for _ in range(2):
        # As read again from the events of a run.
        tool = msgspec.json.decode(msgspec.json.encode(Tool("add", "", schema)), type=Tool)
        await ask(server, providers, msgspec.structs.replace(PROMPT, tools=(tool,)))
    assert converted == [schema]
    sent = [request.body["tools"][0]["function"]["parameters"] for request in server.requests]
    assert sent == [schema, schema]
