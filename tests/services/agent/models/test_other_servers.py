"""Streams and refusals in the shapes of Ollama, vLLM, LM Studio, llama.cpp, Azure, Gemini, DeepSeek, Mistral,
OpenRouter and Groq, none of them as OpenAI writes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx2
import msgspec
import pytest
from msgspec.structs import replace

from services.agent.models import completions
from services.agent.models.contract import (
    AssistantTurn,
    Image,
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    Prompt,
    Tool,
    UserTurn,
)
from services.agent.models.providers import Providers
from services.agent.models.written_calls import taken
from tests.services.agent.models.test_completions import (
    MODEL,
    PROMPT,
    Sends,
    ask,
    call,
    chunk,
    providers,
    server,
    total,
)
from tooling.testing.model_server import ModelServer, Refuses, Streams

__all__ = ["providers", "server"]
HI = chunk({"content": "Hi"})
STOP = chunk(finish="stop")
JSON = '{"a":1,"b":2}'


def of(*chunks: dict[str, Any] | bytes, **more: Any) -> Streams:
    return Streams(chunks, **more)


def sse(value: Any, end: str = "\n\n") -> bytes:
    return b"data: " + msgspec.json.encode(value) + end.encode()


USAGE = total(10, 3)
TEXTS: dict[str, Streams] = {
    "ollama: role in each chunk, usage in the last choice's chunk": of(
        chunk({"role": "assistant", "content": "H"}),
        chunk({"role": "assistant", "content": "i"}),
        chunk({"role": "assistant", "content": ""}, finish="stop", usage=USAGE),
    ),
    "ollama: system_fingerprint, no logprobs, finish load before stop": of(
        HI | {"system_fingerprint": "fp_ollama"}, chunk({"content": ""}, finish="stop", usage=USAGE)
    ),
    "vllm: usage null in each chunk, then a chunk without choices": of(
        chunk({"role": "assistant", "content": ""}, usage=None),
        HI | {"usage": None},
        STOP | {"usage": None},
        chunk(usage=USAGE | {"prompt_tokens_details": None}) | {"choices": []},
    ),
    "vllm: stop_reason and token_ids in the choice": of(
        {**HI, "choices": [{**HI["choices"][0], "token_ids": None, "stop_reason": None}]},
        {**STOP, "choices": [{**STOP["choices"][0], "stop_reason": 151645}], "usage": USAGE},
    ),
    "vllm: continuous usage": of(HI | {"usage": total(10, 1)}, STOP | {"usage": total(10, 3)}),
    "lm studio: stats and a usage chunk after the finish": of(
        HI | {"stats": {}}, STOP | {"stats": {"tokens_per_second": 1.5}}, {"choices": [], "usage": USAGE}
    ),
    "llama.cpp: timings beside the usage": of(HI, STOP | {"usage": USAGE, "timings": {"predicted_n": 3}}),
    "llama.cpp: content null first": of(chunk({"role": "assistant", "content": None}), HI, STOP | {"usage": USAGE}),
    "azure: prompt filter results first, content filter in each choice": of(
        {"choices": [], "prompt_filter_results": [{"prompt_index": 0}], "id": "", "model": "", "created": 0},
        {**HI, "choices": [{**HI["choices"][0], "content_filter_results": {"hate": {"filtered": False}}}]},
        {"choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {"check_offset": 1}}]},
        STOP | {"usage": USAGE},
    ),
    "gemini: the finish reason with the last text, usage in each chunk": of(
        chunk({"role": "assistant", "content": "H"}, usage=total(10, 1, total_tokens=11)),
        chunk({"role": "assistant", "content": "i"}, finish="stop", usage=total(10, 3, total_tokens=13)),
    ),
    "gemini: extra_content with a thought signature": of(
        chunk({"content": "Hi", "extra_content": {"google": {"thought_signature": "s"}}}), STOP | {"usage": USAGE}
    ),
    "deepseek: reasoning_content null beside the text": of(
        chunk({"role": "assistant", "content": None, "reasoning_content": "hm"}),
        chunk({"content": "Hi", "reasoning_content": None}),
        STOP | {"usage": USAGE | {"prompt_cache_hit_tokens": 0, "prompt_cache_miss_tokens": 10}},
    ),
    "deepseek: comments while it waits": of(b": keep-alive\n\n", HI, b": keep-alive\n\n", STOP | {"usage": USAGE}),
    "mistral: no object, usage with the finish": of(
        {"id": "c", "model": MODEL, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]},
        {"id": "c", "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}], "usage": USAGE},
    ),
    "mistral: parts as content": of(chunk({"content": [{"type": "text", "text": "Hi"}]}), STOP | {"usage": USAGE}),
    "mistral: thinking parts as content": of(
        chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}),
        chunk({"content": [{"type": "text", "text": "Hi"}]}),
        STOP | {"usage": USAGE},
    ),
    "openrouter: processing comments, provider, native finish": of(
        b": OPENROUTER PROCESSING\n\n",
        HI | {"provider": "x"},
        {**STOP, "choices": [{**STOP["choices"][0], "native_finish_reason": "end_turn"}]},
        chunk({"role": "assistant", "content": ""}, usage=USAGE | {"cost": 0.01, "is_byok": False}),
    ),
    "openrouter: reasoning beside reasoning_details": of(
        chunk({"content": "", "reasoning": "hm", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]}),
        HI,
        STOP | {"usage": USAGE},
    ),
    "groq: usage in x_groq": of(HI, STOP | {"x_groq": {"id": "r", "usage": USAGE | {"queue_time": 0.1}}}),
    "moonshot: usage in the choice": of(
        HI, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]}
    ),
    "events with names and ids": of(
        b"event: message\nid: 1\n" + sse(HI), b"event: message\nid: 2\nretry: 10\n" + sse(STOP | {"usage": USAGE})
    ),
    "no blank after the colon, carriage returns": of(
        sse(HI, "\r\n\r\n").replace(b"data: ", b"data:"), sse(STOP | {"usage": USAGE}, "\r\n\r\n")
    ),
    "the stream ends without its last line end": of(HI, sse(STOP | {"usage": USAGE}, ""), done=False),
    "done twice": of(HI, STOP | {"usage": USAGE}, b"data: [DONE]\n\n"),
    "empty data lines": of(b"data:\n\n", HI, b"data: \n\n", STOP | {"usage": USAGE}),
    "delta null with the finish": of(
        HI, {"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}], "usage": USAGE}
    ),
    "no delta with the finish": of(HI, {"choices": [{"index": 0, "finish_reason": "stop"}], "usage": USAGE}),
    "no index": of(
        {"choices": [{"delta": {"content": "Hi"}}]}, {"choices": [{"finish_reason": "stop"}], "usage": USAGE}
    ),
    "choices null": of({"choices": None}, HI, STOP | {"usage": USAGE}),
    "finish eos": of(HI, chunk(finish="eos", usage=USAGE)),
    "finish end_turn": of(HI, chunk(finish="end_turn", usage=USAGE)),
    "finish STOP": of(HI, chunk(finish="STOP", usage=USAGE)),
    "finish in two chunks": of(HI, STOP, STOP | {"usage": USAGE}),
    "text after the finish": of(chunk({"content": "H"}), STOP, chunk({"content": "i"}), STOP | {"usage": USAGE}),
    "usage as floats": of(HI, STOP | {"usage": total(10.0, 3.0)}),
    "usage in a list": of(HI, STOP | {"usage": USAGE}, {"choices": [], "usage": [USAGE]}),
    "id and created as other types": of(HI | {"id": 7, "created": "1"}, STOP | {"usage": USAGE, "created": 1.5}),
    "id and model missing": of(
        {"choices": HI["choices"]}, {"choices": STOP["choices"], "usage": USAGE, "model": None, "id": None}
    ),
    "tool_calls null and empty": of(
        chunk({"content": "Hi", "tool_calls": None}), chunk({"tool_calls": []}), STOP | {"usage": USAGE}
    ),
    "snowflake: all fields, with empty values": of(
        {
            "choices": [
                {
                    "finish_reason": "",
                    "message": {
                        "content": "Hi",
                        "function_call": {"arguments": "", "name": ""},
                        "refusal": "",
                        "tool_calls": [{"id": "", "type": "", "function": {"arguments": "", "name": ""}}],
                    },
                }
            ],
            "usage": USAGE,
        }
    ),
    "function_call null": of(chunk({"content": "Hi", "function_call": None, "refusal": None}), STOP | {"usage": USAGE}),
    "usage after the end": of(HI, STOP, b"data: [DONE]\n\n", {"choices": [], "usage": USAGE}, done=False),
    "usage of the output so far, then of the output alone": of(
        HI | {"usage": total(10, 1)}, STOP | {"usage": {"completion_tokens": 3}}
    ),
    "usage of the output so far, then without the input": of(
        HI | {"usage": total(10, 1)}, STOP | {"usage": total(0, 3)}
    ),
    "usage zero or negative at the end": of(
        HI | {"usage": USAGE}, STOP | {"usage": total(0, 0)}, {"choices": [], "usage": total(-1, -1)}
    ),
    "a total that cannot be": of(HI, STOP | {"usage": USAGE | {"total_tokens": 10**12}}),
    "parts that are thoughts with a text": of(
        *(chunk({"content": [{"type": type_, "text": "hm"}]}) for type_ in ("thinking", "reasoning")),
        chunk({"content": [{"type": "output_text", "text": "Hi"}]}),
        STOP | {"usage": USAGE},
    ),
    "thoughts in the text of a part": of(
        chunk({"content": [{"type": "text", "text": "<think>hm"}, {"text": "</think>Hi"}]}), STOP | {"usage": USAGE}
    ),
    "a part that is no list": of(chunk({"content": {"type": "text", "text": "Hi"}}), STOP | {"usage": USAGE}),
    "texts as content": of(chunk({"content": ["H", "i"]}), STOP | {"usage": USAGE}),
    "a whole message of parts": of(
        {
            "choices": [
                {
                    "message": {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Hi"}]},
                    "finish_reason": "stop",
                }
            ],
            "usage": USAGE,
        }
    ),
    "an old completion": of({"choices": [{"text": "Hi"}]}, {"choices": [{"finish_reason": "stop"}], "usage": USAGE}),
    "spaces that keep the connection open": of(b" \n", b"   ", HI, b"  ", STOP | {"usage": USAGE}, b"\n \n"),
    "the model as another type": of(HI | {"model": 5}, STOP | {"usage": USAGE, "model": ["x"]}),
    "gemma: a channel of thoughts": of(
        chunk({"content": "<|channel>thought\nhm<chan"}), chunk({"content": "nel|>Hi"}), STOP | {"usage": USAGE}
    ),
    "minimax: a state that is no error": of(HI, STOP | {"usage": USAGE, "base_resp": {"status_code": 0}}),
}


@pytest.mark.parametrize("shape", TEXTS)
async def test_a_text_is_read(server: ModelServer, providers: Providers, shape: str) -> None:
    server.script(MODEL, TEXTS[shape])
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    assert (answer.text, "".join(streamed)) == ("Hi", "Hi")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (10, 3)
    assert len(server.requests) == 1
    # As it is stored.
    msgspec.json.decode(msgspec.json.encode(answer), type=ModelAnswer)


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


@pytest.mark.parametrize(
    "delta", [{"content": [{"type": "text", "text": "Hi"}, IMAGE]}, {"content": "Hi", "images": [IMAGE]}]
)
async def test_an_image_that_a_model_makes_is_a_part_of_its_text(
    server: ModelServer, providers: Providers, delta: dict[str, Any]
) -> None:
    server.script(MODEL, of(chunk(delta), STOP | {"usage": USAGE}))
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    assert answer.text == "".join(streamed) == "Hi\n\n![image](data:image/png;base64,iVBORw0KGgo=)"


WHOLE = {"choices": [{"message": {"content": "<think>hm</think>Hi"}, "finish_reason": "stop"}], "usage": USAGE}
PIECES = b"".join((sse(chunk({"content": "<think>hm</think>Hi"})), sse(STOP | {"usage": USAGE}), b"data: [DONE]\n\n"))


@pytest.mark.parametrize("type_", ["text/event-stream", "text/plain; charset=utf-8", "application/json", "", "x/y"])
@pytest.mark.parametrize(
    "content", [PIECES, msgspec.json.encode(WHOLE), msgspec.json.format(msgspec.json.encode(WHOLE))]
)
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \n  \n"])
async def test_the_content_shows_what_an_answer_is(type_: str, content: bytes, before: bytes) -> None:
    answer = await _answer(Sends([before, content], type_.encode()))
    assert (answer.text, answer.usage.output_tokens) == ("Hi", 3)


@pytest.mark.parametrize("type_", [b"text/html", b"application/json", b"text/event-stream"])
async def test_a_web_page_is_told(type_: bytes) -> None:
    with pytest.raises(ModelFailed, match="web page"):
        await _answer(Sends([b"\n<!doctype html>", b"<html>Sign in</html>"], type_))


class StaysOpen(Sends):
    """The stream does not end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in super().__aiter__():
            yield piece
        await asyncio.Event().wait()


async def test_an_answer_is_complete_at_its_end_if_the_connection_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "REST_SECONDS", 0.01)
    async with asyncio.timeout(5):
        answer = await _answer(StaysOpen([PIECES]))
    assert (answer.text, answer.usage.output_tokens) == ("Hi", 3)


async def _answer(transport: httpx2.AsyncBaseTransport) -> ModelAnswer:
    async def hear(text: str) -> None:
        """Drops a text."""

    providers = Providers(transport)
    answer = await providers.model("openai/x", ModelEndpoint("http://a.example")).answer(PROMPT, hear)
    await providers.close()
    return answer


CALLS: dict[str, Streams] = {
    "ollama: whole call, index in the function, arguments as an object": of(
        chunk({"role": "assistant", "content": "", "tool_calls": [call(None, "c1", "add", {"a": 1, "b": 2})]}),
        chunk({"content": ""}, finish="tool_calls"),
    ),
    "ollama: finish stop after a call": of(chunk({"tool_calls": [call(0, "c1", "add", JSON)]}), STOP),
    "vllm: name first, then pieces with a null name": of(
        chunk({"tool_calls": [call(0, "c1", "add", "")]}),
        *(chunk({"tool_calls": [call(0, None, None, piece)]}) for piece in ('{"a":1', ',"b":2}')),
        chunk({"content": ""}, finish="tool_calls"),
    ),
    "gemini: index 0, the id empty": of(chunk({"tool_calls": [call(0, "", "add", JSON)]}), chunk(finish="stop")),
    "gemini: a thought signature": of(
        chunk({"tool_calls": [call(0, "c1", "add", JSON) | {"extra_content": {"google": {"thought_signature": "s"}}}]}),
        chunk(finish="tool_calls"),
    ),
    "mistral: id null until the call, whole arguments, finish tool_calls": of(
        chunk({"content": "", "tool_calls": [call(0, "null", "add", JSON)]}, finish="tool_calls")
    ),
    "llama.cpp: arguments in single characters": of(
        chunk({"tool_calls": [call(0, "c1", "add", "")]}),
        *(chunk({"tool_calls": [call(0, None, None, sign)]}) for sign in JSON),
        chunk(finish="tool_calls"),
    ),
    "lm studio: index as a string": of(
        chunk({"tool_calls": [call(None, "c1", "add", JSON) | {"index": "0"}]}), chunk(finish="tool_calls")
    ),
    "deepseek: the call in the finish's chunk": of(
        chunk({"tool_calls": [call(0, "c1", "add", JSON)]}, finish="tool_calls")
    ),
    "each piece repeats the name of the function": of(
        chunk({"tool_calls": [call(0, "c1", "add", '{"a":1')]}),
        chunk({"tool_calls": [call(0, "c1", "add", ',"b":2}')]}),
        chunk(finish="tool_calls"),
    ),
    "each piece repeats the arguments from the start": of(
        chunk({"tool_calls": [call(0, "c1", "add", "")]}),
        *(chunk({"tool_calls": [call(0, None, None, JSON[:end])]}) for end in (1, 6, 7, len(JSON))),
        chunk(finish="tool_calls"),
    ),
    "the last piece repeats the arguments as a whole": of(
        chunk({"tool_calls": [call(0, "c1", "add", "")]}),
        *(chunk({"tool_calls": [call(0, None, None, piece)]}) for piece in ('{"a":1', ',"b":2}', JSON)),
        chunk(finish="tool_calls"),
    ),
    "the call comes again as a whole": of(
        *(chunk({"tool_calls": [call(0, "c1", name, text)]}) for name, text in (("add", '{"a":1'), (None, ',"b":2}'))),
        *(chunk({"tool_calls": [call(0, "c1", "add", JSON)]}) for _ in range(2)),
        chunk(finish="tool_calls"),
    ),
    "an empty object before the arguments": of(
        chunk({"tool_calls": [call(0, "c1", "add", "{}")]}),
        *(chunk({"tool_calls": [call(0, None, None, piece)]}) for piece in ('{"a":1', ',"b":2}')),
        chunk(finish="tool_calls"),
    ),
    "the arguments three times": of(
        chunk({"tool_calls": [call(0, "c1", "add", JSON * 3)]}), chunk(finish="tool_calls")
    ),
    "the pieces of the arguments twice": of(
        chunk({"tool_calls": [call(0, "c1", "add", "")]}),
        *(chunk({"tool_calls": [call(0, None, None, piece)]}) for piece in ('{"a":1', ',"b":2}') * 2),
        chunk(finish="tool_calls"),
    ),
    "an old server: function_call": of(
        chunk({"function_call": {"name": "add", "arguments": ""}}),
        *(chunk({"function_call": {"arguments": piece}}) for piece in ('{"a":1', ',"b":2}')),
        chunk(finish="function_call"),
    ),
    "no list": of(chunk({"tool_calls": call(0, "c1", "add", JSON)}), chunk(finish="tool_calls")),
    "type missing": of(
        chunk({"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": JSON}}]}),
        chunk(finish="tool_calls"),
    ),
    "the name after the id": of(
        chunk({"tool_calls": [{"index": 0, "id": "c1", "type": "function"}]}),
        chunk({"tool_calls": [call(0, None, "add", "")]}),
        chunk({"tool_calls": [call(0, None, None, JSON)]}),
        chunk(finish="tool_calls"),
    ),
    "the name after the arguments": of(
        chunk({"tool_calls": [call(0, "c1", "", JSON)]}),
        chunk({"tool_calls": [call(0, None, "add", "")]}),
        chunk(finish="tool_calls"),
    ),
    "the fields of the function beside the id": of(
        chunk({"tool_calls": [{"index": 0, "id": "c1", "name": "add", "arguments": {"a": 1, "b": 2}}]}),
        chunk(finish="tool_use"),
    ),
    "the id as a number": of(chunk({"tool_calls": [call(0, None, "add", JSON) | {"id": 7}]}), chunk(finish="stop")),
    "the index as a fraction": of(
        *(
            chunk({"tool_calls": [call(None, id_, name, piece) | {"index": 1.0}]})
            for id_, name, piece in (("c1", "add", '{"a":1'), (None, None, ',"b":2}'))
        ),
        chunk(finish="tool_calls"),
    ),
    "blanks around the name": of(chunk({"tool_calls": [call(0, "c1", " add\n", JSON)]}), chunk(finish="tool_calls")),
    "arguments as JSON in a text": of(
        chunk({"tool_calls": [call(0, "c1", "add", msgspec.json.encode(JSON).decode())]}), chunk(finish="tool_calls")
    ),
    "blanks around the arguments": of(
        chunk({"tool_calls": [call(0, "c1", "add", f"\n {JSON} \n")]}), chunk(finish="tool_calls")
    ),
    "finish function_call": of(chunk({"tool_calls": [call(0, "c1", "add", JSON)]}), chunk(finish="function_call")),
    "no finish": of(chunk({"tool_calls": [call(0, "c1", "add", JSON)]})),
    "a call with its namespace": of(chunk({"tool_calls": [call(0, "functions.add:0", "functions.add", JSON)]}, "stop")),
    "a call in a whole message": of(
        {
            "choices": [
                {
                    "message": {"content": None, "tool_calls": [call(None, "c1", "add", JSON)]},
                    "finish_reason": "tool_calls",
                }
            ]
        }
    ),
}


@pytest.mark.parametrize("shape", CALLS)
async def test_a_call_is_read(server: ModelServer, providers: Providers, shape: str) -> None:
    server.script(MODEL, CALLS[shape])
    answer = await ask(server, providers)
    assert [(one.name, msgspec.json.decode(one.arguments)) for one in answer.calls] == [("add", {"a": 1, "b": 2})]
    assert len(server.requests) == 1
    msgspec.json.decode(msgspec.json.encode(answer), type=ModelAnswer)


async def test_null_arguments_are_none(server: ModelServer, providers: Providers) -> None:
    server.script(MODEL, of(chunk({"tool_calls": [call(0, "c1", "add", "null")]}, "tool_calls")))
    assert [one.arguments for one in (await ask(server, providers)).calls] == ["{}"]


WRITTEN = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("pieces", "said", "count"),
    [
        ((WRITTEN,), "", 1),
        (("\n", *WRITTEN), "", 1),
        (("<think>hm</think>", WRITTEN, "\n", WRITTEN), "", 2),
        (("One moment.", "\n<tool", WRITTEN.removeprefix("<tool")), "One moment.", 1),
        # The closing tag is the end of the answer for some servers.
        ((WRITTEN.removesuffix("</tool_call>"),), "", 1),
    ],
)
async def test_a_call_that_is_written_as_text_is_a_call(
    server: ModelServer, providers: Providers, pieces: tuple[str, ...], said: str, count: int
) -> None:
    server.script(MODEL, of(*(chunk({"content": piece}) for piece in pieces), STOP))
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    assert [(one.name, msgspec.json.decode(one.arguments)) for one in answer.calls] == [
        ("add", {"a": 1, "b": 2})
    ] * count
    assert len({one.id for one in answer.calls}) == count
    assert (answer.text, "".join(streamed).strip()) == (said, said)


BARE = '{"name": "add", "parameters": {"a": 1, "b": 2}}'
AS_PARAMETERS = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>"
FORMS = {
    "Llama 3 with a function's tag": ('<function=add>{"a": 1, "b": 2}</function>', 1),
    "Llama 3 with its mark": (f"<|python_tag|>{BARE}; {BARE}<|eom_id|>", 2),
    "Mistral with a list": (f"[TOOL_CALLS] [{BARE.replace('parameters', 'arguments')}]", 1),
    "Mistral with names": ('[TOOL_CALLS]add{"a": 1, "b": 2}[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}</s>', 2),
    "Qwen3-Coder": (f"<tool_call>\n{AS_PARAMETERS}\n</tool_call>\n<tool_call>\n{AS_PARAMETERS}\n</tool_call>", 2),
    "Qwen3-Coder without a tag": (f"{AS_PARAMETERS}\n</tool_call>", 1),
    "DeepSeek V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1, "b": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        1,
    ),
    "DeepSeek V3.2": (
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="b" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        1,
    ),
    "MiniMax M2": (
        '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">1</parameter>\n<parameter name="b">2</parameter>'
        "\n</invoke>\n</minimax:tool_call>",
        1,
    ),
    "GLM-4.5": (
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
        1,
    ),
    "Kimi K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a": 1, "b": 2}<|tool_call_end|><|tool_calls_section_end|>',
        1,
    ),
    "DeepSeek V3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}<｜tool▁call▁end｜>'
        '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        2,
    ),
}


@pytest.mark.parametrize("said", ["", "One moment."])
@pytest.mark.parametrize("form", FORMS)
async def test_a_call_is_read_in_each_form(server: ModelServer, providers: Providers, form: str, said: str) -> None:
    written, count = FORMS[form]
    numbers = {"type": "object", "properties": {name: {"type": "integer"} for name in "ab"}}
    prompt = replace(PROMPT, tools=(Tool("add", "", numbers),))
    server.script(MODEL, of(*(chunk({"content": sign}) for sign in f"{said}\n{written}"), STOP))
    streamed: list[str] = []
    answer = await ask(server, providers, prompt, streamed)
    made = [(one.name, msgspec.json.decode(one.arguments)) for one in answer.calls]
    assert made == [("add", {"a": 1, "b": 2})] * count
    assert (answer.text.strip(), "".join(streamed).strip()) == (said, said)


@pytest.mark.parametrize("written", [BARE, f" {BARE};\n{BARE}", BARE.replace("{", '{ "type": "function", ', 1)])
async def test_an_answer_that_is_only_the_json_of_calls_makes_them(
    server: ModelServer, providers: Providers, written: str
) -> None:
    pieces = [chunk({"content": sign}) for sign in written]
    streamed: list[str] = []
    server.script(MODEL, of(*pieces, STOP))
    answer = await ask(server, providers, streamed=streamed)
    made = [(one.name, msgspec.json.decode(one.arguments)) for one in answer.calls]
    assert (made, answer.text, streamed) == ([("add", {"a": 1, "b": 2})] * written.count("add"), "", [])
    # It is the answer if JSON was asked for, or the tool was not offered.
    for prompt in (replace(PROMPT, output_schema={"type": "object"}), replace(PROMPT, tools=())):
        server.script(MODEL, of(*pieces, STOP))
        answer = await ask(server, providers, prompt=prompt)
        assert (answer.text.strip(), answer.calls) == (written.strip(), ())


def test_the_parameters_of_a_written_call_are_texts_or_json_as_the_schema_says() -> None:
    kinds = {
        "text": {"type": "string"},
        "perhaps": {"type": ["string", "null"]},
        "flag": {"type": "boolean"},
        "none": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "part": {"$ref": "#/$defs/part"},
        "odd": True,
    }
    values = {
        "text": "1",
        "perhaps": "null",
        "flag": "True",
        "none": "None",
        "part": '{"x": 1}',
        "odd": "2",
        "code": "a\n </p>",
    }
    written = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in values.items())
    tool = Tool("run", "", {"type": "object", "properties": kinds})
    _, [made] = taken(f"<function=run>\n{written}</function>", {"run": tool}, bare=True)
    assert made.arguments == values | {"flag": True, "none": None, "part": {"x": 1}}


async def test_a_call_in_both_forms_is_one(server: ModelServer, providers: Providers) -> None:
    made = chunk({"content": WRITTEN, "tool_calls": [call(0, "c1", "add", JSON)]})
    server.script(MODEL, of(made, chunk(finish="tool_calls")))
    answer = await ask(server, providers)
    assert ([one.id for one in answer.calls], answer.text) == (["c1"], "")


@pytest.mark.parametrize(
    "content",
    [
        WRITTEN.replace("1", "one"),
        WRITTEN.replace("arguments", "input"),
        f"{WRITTEN} Done.",
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>",
        "<tool_call></tool_call>",
        "<|python_tag|>add.call(a=1)",
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a"',
        "<｜tool▁calls▁begin｜>",
        "<tool_call>add this",
    ],
)
async def test_a_text_that_begins_as_a_call_and_is_none_is_no_answer(
    server: ModelServer, providers: Providers, content: str
) -> None:
    server.script(MODEL, of(chunk({"content": content}), STOP))
    streamed: list[str] = []
    with pytest.raises(ModelFailed, match="malformed") as failed:
        await ask(server, providers, streamed=streamed)
    assert (failed.value.transient, streamed) == (True, [])


@pytest.mark.parametrize(
    "content",
    [
        "Hermes writes `<tool_call>` before a call.",
        "<tool_call> is what Hermes writes to call a tool such as add.",
        "[TOOL_CALLS] is what Mistral writes, such as\n\n> [TOOL_CALLS] [",
        f"{WRITTEN.replace('add', 'made_up')}\n\nSo Hermes writes calls.",
        "<function=made_up>{}</function>",
        "<|python_tag|>print(1)",
        f"It writes\n```\n{WRITTEN}\n```",
        f"It writes\n```\n{WRITTEN}",
        "It writes <tool_call>add</tool_call>",
        "a <",
        "Mistral writes [TOOL_CALLS] before a list.",
        f"```json\n{BARE}\n```",
        f"{BARE} is a call.",
        BARE.replace("add", "made_up"),
        BARE.replace("{", '{"comment": "", ', 1),
        '{"name": "add", "description": "adds"}',
        '{"nam',
    ],
)
async def test_an_answer_about_calls_is_a_text(server: ModelServer, providers: Providers, content: str) -> None:
    server.script(MODEL, of(*(chunk({"content": sign}) for sign in content), STOP))
    streamed: list[str] = []
    answer = await ask(server, providers, streamed=streamed)
    assert (answer.text, "".join(streamed), answer.calls) == (content, content, ())


async def test_two_calls_in_turns_with_texts_as_indexes_are_two(server: ModelServer, providers: Providers) -> None:
    pieces = [(n, id_, name, text) for id_, name, text in (("c", "add", ""), (None, None, JSON)) for n in "01"]
    made = [call(None, id_ and id_ + n, name, text) | {"index": n} for n, id_, name, text in pieces]
    server.script(MODEL, of(*(chunk({"tool_calls": [one]}) for one in made), chunk(finish="tool_calls")))
    assert [(one.id, one.arguments) for one in (await ask(server, providers)).calls] == [("c0", JSON), ("c1", JSON)]


async def test_a_character_of_the_arguments_that_is_cut_in_two_is_whole(
    server: ModelServer, providers: Providers
) -> None:
    texts = (rb"{\"a\":\"\ud83d", rb"\ude00\"}")
    pieces = (sse(chunk({"tool_calls": [call(0, "c", name, "x")]})) for name in ("add", None))
    chunks = (piece.replace(b'"x"', b'"%s"' % text) for piece, text in zip(pieces, texts, strict=True))
    server.script(MODEL, of(*chunks, chunk(finish="tool_calls")))
    assert (await ask(server, providers)).calls[0].arguments == '{"a":"😀"}'


@pytest.mark.parametrize(
    "made",
    [
        {"index": 0, "id": "c", "function": {"arguments": JSON}},
        {"index": 0, "id": "c", "function": {"name": 7, "arguments": JSON}},
        {"index": 0, "id": "c", "type": "custom", "custom": {"name": "add", "input": "x"}},
    ],
)
async def test_a_call_without_a_name_is_no_answer(
    server: ModelServer, providers: Providers, made: dict[str, Any]
) -> None:
    server.script(MODEL, of(chunk({"tool_calls": [made]}), chunk(finish="tool_calls")))
    with pytest.raises(ModelFailed, match="without a name"):
        await ask(server, providers)


REFUSALS: dict[str, tuple[Refuses, bool]] = {
    "ollama: no such model": (Refuses(404, {"error": "model 'x' not found"}), False),
    "ollama: loading": (Refuses(503, {"error": "server busy, please try again"}), True),
    "vllm: too long": (
        Refuses(400, {"object": "error", "message": "maximum context length is 4096", "type": "BadRequestError"}),
        False,
    ),
    "lm studio: no model": (Refuses(400, {"error": "No models loaded."}), False),
    "azure: filtered": (
        Refuses(400, {"error": {"code": "content_filter", "message": "filtered", "status": 400}}),
        False,
    ),
    "azure: too many": (Refuses(429, {"error": {"code": "429", "message": "Please retry after 1 second."}}), True),
    "gemini: a list": (Refuses(400, [{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}]), False),
    "gemini: overloaded": (Refuses(503, [{"error": {"code": 503, "message": "overloaded"}}]), True),
    "deepseek: no balance": (Refuses(402, {"error": {"message": "Insufficient Balance"}}), False),
    "mistral: fields": (Refuses(422, {"object": "error", "message": {"detail": [{"loc": ["body", "x"]}]}}), False),
    "llama.cpp: no images": (
        Refuses(500, {"error": {"code": 500, "message": "image input is not supported - hint: provide the mmproj"}}),
        False,
    ),
    "llama.cpp: no tools": (
        Refuses(500, {"error": {"code": 500, "message": "tools param requires --jinja flag"}}),
        False,
    ),
    "llama.cpp: too long": (
        Refuses(500, {"error": {"code": 500, "message": "the request exceeds the available context size."}}),
        False,
    ),
    "ollama: no images": (
        Refuses(500, {"error": {"message": "this model is missing data required for image input"}}),
        False,
    ),
    "openrouter: upstream": (Refuses(502, {"error": {"code": 502, "message": "Provider returned error"}}), True),
    "cloudflare: a page": (Refuses(520, "<html>Web server is returning an unknown error</html>"), True),
    "a proxy: gone for a while": (Refuses(529, {"type": "error", "error": {"type": "overloaded_error"}}), True),
    "groq: what the model has written": (
        Refuses(400, {"error": {"message": "Failed to call a function.", "code": "tool_use_failed"}}),
        True,
    ),
    "groq: no JSON": (
        Refuses(400, {"error": {"message": "Failed to generate JSON.", "code": "json_validate_failed"}}),
        True,
    ),
    "a wrong key": (Refuses(401, {"detail": "Unauthorized"}), False),
    "an empty body": (Refuses(500, ""), True),
    "null": (Refuses(400, None), False),
}


@pytest.mark.parametrize("shape", REFUSALS)
async def test_a_refusal_is_told_apart(server: ModelServer, providers: Providers, shape: str) -> None:
    refusal, transient = REFUSALS[shape]
    server.script(MODEL, *[refusal] * 6)
    with pytest.raises(ModelFailed) as failed:
        await ask(server, providers)
    assert failed.value.transient is transient
    assert failed.value.reason


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            {"detail": [{"loc": ["body", "top_k"], "msg": "not permitted", "input": "private"}]},
            "body.top_k: not permitted",
        ),
        (
            {"object": "error", "message": {"detail": [{"loc": ["body", "n", 0], "msg": "too large"}, 7]}},
            "body.n.0: too large",
        ),
        ({"detail": [{"msg": "bad"}]}, ""),
    ],
)
async def test_the_fields_that_a_server_refuses_are_named_without_their_values(
    server: ModelServer, providers: Providers, body: Any, told: str
) -> None:
    server.script(MODEL, Refuses(422, body))
    with pytest.raises(ModelFailed) as failed:
        await ask(server, providers)
    assert failed.value.reason == f"openai/{MODEL}: HTTP 422" + (f": {told}" if told else "")


RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "57.238747106s"}


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Quota", "details": [RETRY_INFO]}, 57.238747),
        ({"code": 429, "message": "You exceeded your quota. Please retry in 31.5s."}, 31.5),
        ({"code": 429, "message": "Rate limit reached. Please try again in 20s."}, 20),
        ({"code": 429, "message": "Please retry after 26 seconds."}, 26),
        ({"code": 429, "message": "Please try again in 6m0s."}, None),
        ({"code": 429, "message": "Please try again in 20ms."}, None),
        ({"code": 429, "message": "Please try again later"}, None),
    ],
)
async def test_a_delay_in_the_words_of_an_error_is_kept(
    server: ModelServer, providers: Providers, error: Any, seconds: float | None
) -> None:
    expected = None if seconds is None else timedelta(seconds=seconds)
    server.script(MODEL, Refuses(429, [{"error": error}]), of(sse({"error": error})))
    for _ in range(2):
        with pytest.raises(ModelFailed) as failed:
            await ask(server, providers)
        assert (failed.value.transient, failed.value.after) == (True, expected)


@pytest.mark.parametrize(
    "event",
    [
        {
            "error": {"code": 502, "message": "Provider disconnected"},
            "choices": [{"finish_reason": "error", "delta": {}}],
        },
        {"error": "rate limited"},
        {"error": {"message": "overloaded", "type": "server_error"}},
        {"object": "error", "error": {"message": "engine died", "code": 500}},
        {"object": "error", "message": "engine died", "type": "InternalServerError", "code": 500},
        {"detail": "Internal Server Error"},
        {"choices": [], "message": "overloaded"},
        *(
            {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
            for finish in (
                *("abort", "cancelled", "timeout", "insufficient_system_resource", "MALFORMED_FUNCTION_CALL"),
                *("function_call_filter: MALFORMED_FUNCTION_CALL", "unexpected_tool_call", "engine_overloaded"),
            )
        ),
        {"code": 500, "msg": "busy"},
        {"errors": [{"message": "busy"}]},
        {"choices": [{"index": 0, "delta": {}, "error": {"message": "busy"}}]},
        {"choices": None, "base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        b'event: error\ndata: {"reason": "busy"}\n\n',
        [{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}],
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]},
    ],
)
async def test_an_error_in_the_middle_is_no_answer(server: ModelServer, providers: Providers, event: Any) -> None:
    server.script(MODEL, *[of(HI, event if isinstance(event, bytes) else sse(event))] * 6)
    with pytest.raises(ModelFailed) as failed:
        await ask(server, providers)
    assert failed.value.transient


TOO_LONG = {"code": 400, "message": "Token limit reached"}


@pytest.mark.parametrize(
    ("event", "transient", "told"),
    [
        ({"error": TOO_LONG, "choices": [{"finish_reason": None, "delta": {}}]}, False, "Token limit reached"),
        ({"error": TOO_LONG | {"code": "400"}}, False, "Token limit reached"),
        ([{"error": TOO_LONG | {"status": "INVALID_ARGUMENT"}}], False, "Token limit reached"),
        ({"object": "error", **TOO_LONG}, False, "Token limit reached"),
        (b'event: error\ndata: {"message": "Token limit reached", "status": 400}\n\n', False, "Token limit reached"),
        ({"choices": [{"index": 0, "delta": {}, "error": TOO_LONG}]}, False, "Token limit reached"),
        ({"error": {"code": 402, "message": "Insufficient credits"}}, False, "Insufficient credits"),
        ({"error": {"code": 429, "message": "No more", "type": "insufficient_quota"}}, False, "No more"),
        ({"error": {"code": 429, "message": "Busy", "metadata": {"raw": "try later"}}}, True, "Busy: try later"),
        ({"error": {"code": "tool_use_failed", "status_code": 400, "message": "No call"}}, True, "No call"),
        ({"error": {"code": 401, "message": "Incorrect key sk-abc"}}, False, "api_key"),
        ({"error": "rate limited"}, True, "rate limited"),
        (b"event: error\n\n", True, "failed during the answer"),
    ],
)
async def test_an_error_in_the_middle_is_told_and_is_transient_by_its_status(
    server: ModelServer, providers: Providers, event: Any, transient: bool, told: str
) -> None:
    server.script(MODEL, of(HI, event if isinstance(event, bytes) else sse(event)))
    with pytest.raises(ModelFailed, match="the server failed during the answer") as failed:
        await ask(server, providers)
    assert failed.value.transient is transient
    assert told in failed.value.reason
    assert "sk-abc" not in failed.value.reason


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        *(
            (word, "length")
            for word in ("MAX_TOKENS", "max_tokens", "model_length", "max_output_tokens", "token_limit")
        ),
        *(
            (word, "content_filter")
            for word in ("SAFETY", "refusal", "sensitive", "content_filter: RECITATION", "content_filtered")
        ),
        # Words of unknown ends.
        *((word, "length") for word in ("repetition", "OTHER", "pause_turn", "FINISH_REASON_OTHER")),
        *((word, "stop") for word in ("STOP", "eos", "end_turn", "stop_sequence", "COMPLETE")),
        *((word, "stop") for word in ("", "null", "None")),
        *((word, "tool_call") for word in ("tool_calls", "tool_use", "function_call")),
    ],
)
async def test_the_end_of_an_answer_is_told_in_the_words_of_servers(
    server: ModelServer, providers: Providers, finish: str, reason: str
) -> None:
    server.script(MODEL, of(HI, chunk(finish=finish)))
    assert (await ask(server, providers)).finish_reason == reason


TOLD = (UserTurn("one"), UserTurn("two", (Image(url="https://e.example/a.png"),)), AssistantTurn("yes"), UserTurn("?"))


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize(
    ("refusal", "system", "roles"),
    [
        ("System role not supported", False, ["user", "assistant", "user"]),
        ("Developer instruction is not enabled for models/gemma", False, ["user", "assistant", "user"]),
        (
            "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
            False,
            ["user", "assistant", "user"],
        ),
        ("'system' role is not supported", False, ["user", "assistant", "user"]),
        (
            "Conversation roles must alternate user/assistant/user/assistant/...",
            True,
            ["system", "user", "assistant", "user"],
        ),
        ("user and assistant roles should be alternating", True, ["system", "user", "assistant", "user"]),
    ],
)
async def test_an_order_of_roles_that_a_template_refuses_is_changed_for_good(
    server: ModelServer, providers: Providers, refusal: str, system: bool, roles: list[str], status: int
) -> None:
    server.script(MODEL, Refuses(status, {"object": "error", "message": refusal}))
    for _ in range(2):
        assert (await ask(server, providers, Prompt("Be kind.", TOLD))).text == "You said: ?"
    assert len(server.requests) == 3
    for request in server.requests[1:]:
        messages = request.body["messages"]
        assert [message["role"] for message in messages] == roles
        texts = [part.get("text") for part in messages[int(system)]["content"]]
        assert texts == ["one" if system else "Be kind.\n\none", "two", None]


async def test_what_is_remembered_of_endpoints_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "_REMEMBERED", 2)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if b"seed" in request.content:
            return httpx2.Response(400, text="unknown option seed")
        thoughts = sse(chunk({"content": "they are angry</think>Hello"})) + sse(STOP)
        return httpx2.Response(200, content=thoughts, headers={"content-type": "text/event-stream"})

    transport = completions.Completions(httpx2.MockTransport(answer))
    for n in range(3):
        url = f"http://{n}.example/chat/completions"
        response = await transport.handle_async_request(httpx2.Request("POST", url, json={"model": "m", "seed": 1}))
        assert b"angry" not in await response.aread()
        await response.aclose()
    assert (len(transport._refused), len(transport._thinks_aloud)) == (2, 2)
