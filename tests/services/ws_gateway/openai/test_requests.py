"""The conversation of a request, and refused requests."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from services.ws_gateway.openai.conversation import ClientFunction, CompletionRequest, Earlier, FunctionCall
from services.ws_gateway.openai.errors import CompletionError
from services.ws_gateway.openai.requests import ChatRequest, ResponsesRequest

HI = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FUNCTION_CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "1", "output": "Bern"}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "Bern"}
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(7)).decode()
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


TOOL = function(name="f")


def chat(*messages: Any, **fields: Any) -> CompletionRequest:
    return ChatRequest.model_validate({"model": "m", "messages": messages or [HI], **fields}).to_conversation()


def responses(input_: Any = "Hi", **fields: Any) -> CompletionRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": input_, **fields}).to_conversation()


def test_the_last_message_is_asked_what_was_before_is_history_and_system_messages_are_together() -> None:
    found = chat(
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]},
        {"role": "assistant", "content": "Yes?", "tool_calls": []},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": " Hi 🦀\u200f\n"},
        {"role": "developer", "content": "In French."},
    )
    assert found == CompletionRequest(
        " Hi 🦀\u200f\n", [Earlier("user", "One\nTwo"), Earlier("assistant", "Yes?")], "Be brief.\n\nIn French."
    )
    assert chat() == CompletionRequest("Hi", [], None)


def test_a_system_message_alone_is_answered() -> None:
    said = [{"role": "system", "content": "In French."}, {"role": "developer", "content": "Write a poem."}]
    assert chat(*said) == CompletionRequest("Write a poem.", [], "In French.")
    assert chat(said[0], {"role": "user", "content": "Hi"}) == CompletionRequest("Hi", [], "In French.")


def test_the_input_of_a_response_is_text_or_messages() -> None:
    assert responses("Hi", instructions="Be brief.") == CompletionRequest("Hi", [], "Be brief.")
    answer = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    assert responses(
        [
            {"role": "developer", "content": "In French."},
            {"role": "user", "content": [{"type": "input_text", "text": "One"}]},
            answer | {"content": [{"type": "output_text", "text": "Yes?", "annotations": []}]},
            {"type": "message", "role": "user", "content": "Hi"},
        ],
        instructions="Be brief.",
    ) == CompletionRequest("Hi", [Earlier("user", "One"), Earlier("assistant", "Yes?")], "Be brief.\n\nIn French.")


def test_how_the_answer_is_to_be_written_goes_to_the_model() -> None:
    assert chat(
        temperature=0.2,
        top_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        seed=7,
        reasoning_effort="low",
        max_tokens=4,
        max_completion_tokens=5,
        stop=["\n", "", "Observation:"],
    ).sampling == {
        "temperature": 0.2,
        "top_p": 1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "seed": 7,
        "reasoning_effort": "low",
        "max_output_tokens": 5,
        "stop": ("\n", "Observation:"),
    }
    assert chat(stop="x", max_tokens=4).sampling == {"stop": ("x",), "max_output_tokens": 4}
    assert chat(max_tokens=-1, stop=[], temperature=None, seed=None, top_p=None).sampling == {}
    asked = responses(temperature=0, max_output_tokens=9, reasoning={"effort": "high", "summary": "auto"})
    assert asked.sampling == {"temperature": 0, "max_output_tokens": 9, "reasoning_effort": "high"}
    assert responses(reasoning={"effort": None}, max_output_tokens=None).sampling == {}


def test_functions_are_tools_as_they_were_before() -> None:
    where = {"name": "f", "description": "d", "parameters": OBJECT}
    f, g = ClientFunction("f", "d", OBJECT), ClientFunction("g", "", OBJECT)
    found = chat(functions=[where, {"name": "g"}], function_call={"name": "g"})
    assert (found.tools, found.must_call, found.parallel) == ((g,), True, False)
    assert chat(functions=[where, {"name": "g"}], function_call="auto").tools == (f, g)
    assert chat(functions=[where], function_call="none").tools == ()
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": "Bern"}
    found = chat(HI, called, result, {"role": "assistant", "content": "Bern."}, HI, called, result)
    first, second = FunctionCall("call_1", "f", "{}"), FunctionCall("call_5", "f", "{}")
    assert found.history[1:3] == [Earlier("assistant", "", (first,)), Earlier("tool", "Bern", call=first)]
    assert found.since == (Earlier("assistant", "", (second,)), Earlier("tool", "Bern", call=second))


def test_only_allowed_tools_are_offered() -> None:
    tools = [function(name=name) for name in "fgh"]
    allowed = {"mode": "required", "tools": [function(name="h"), function(name="f")]}
    found = chat(tools=tools, tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert ([tool.name for tool in found.tools], found.must_call) == (["h", "f"], True)
    flat = [{"type": "function", "name": name} for name in "fg"]
    found = responses(tools=flat, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": flat[1:]})
    assert ([tool.name for tool in found.tools], found.must_call) == (["g"], False)


def test_what_changes_nothing_is_ignored() -> None:
    found = chat(
        user="u",
        metadata={"a": "b"},
        store=True,
        n=1,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        functions=[],
        logprobs=False,
        response_format={"type": "text"},
        modalities=["text"],
        stop=[],
        something_new={},
        verbosity="low",
        logit_bias={"50256": -100},
        service_tier="auto",
    )
    assert found == CompletionRequest("Hi", [], None)
    assert (
        responses(store=True, tools=[], text={"format": {"type": "text"}}, truncation="auto", include=[]).text == "Hi"
    )


def test_images_of_a_user_go_with_the_message() -> None:
    url = IMAGE["image_url"]["url"]
    asked = chat(
        {"role": "user", "content": [{"type": "text", "text": "what"}, IMAGE]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [IMAGE, IMAGE | {"image_url": {"url": "https://example.org/a.png"}}]},
    )
    assert (asked.history[0].text, asked.history[0].images) == ("what", (url,))
    assert (asked.text, asked.images) == ("[image]", (url, "https://example.org/a.png"))


@pytest.mark.parametrize("type_", ["image/PNG", "image/x-png", "image/png;charset=utf-8", "application/octet-stream"])
def test_an_image_counts_by_its_content_whatever_type_the_client_states(type_: str) -> None:
    url = f"data:{type_};base64,{PNG}"
    asked = chat({"role": "user", "content": [IMAGE | {"image_url": {"url": url}}]})
    assert asked.images == (url,)


OBJECT = {"type": "object", "properties": {}}
# Of every option that OpenAI's reference names.
OPTIONS = (
    *("temperature", "top_p", "n", "stop", "max_tokens", "max_completion_tokens", "presence_penalty", "seed", "user"),
    *("frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
    *("response_format", "stream", "stream_options", "functions", "function_call", "modalities", "audio", "prediction"),
    *("metadata", "store", "reasoning_effort", "verbosity", "service_tier", "safety_identifier", "web_search_options"),
)


@pytest.mark.parametrize(
    "fields",
    [
        *({name: None} for name in OPTIONS),
        dict.fromkeys(OPTIONS),
        {"n": 1.0},
        {"stream": True, "stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": None}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
        {"stream_options": {"include_usage": True}},
        {"tool_choice": "auto"},
        {"tools": [function(name="f", description=None, strict=None)]},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": None, "schema": OBJECT}}},
        # Options that vLLM, Ollama, Gemini, OpenRouter, DeepSeek and llama.cpp add.
        {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": False}},
        {"keep_alive": "5m", "options": {"num_ctx": 1}, "think": True, "cache_prompt": True, "safety_settings": []},
        {"provider": {"order": ["x"]}, "transforms": [], "models": None, "usage": {"include": True}, "route": None},
        {"reasoning": {"effort": "low"}, "thinking": {"type": "enabled"}, "extra_body": {"a": 1}},
    ],
)
def test_options_given_as_null_and_those_of_other_servers_change_nothing(fields: dict[str, Any]) -> None:
    assert chat(**fields).text == "Hi"


@pytest.mark.parametrize(
    ("messages", "history"),
    [
        ([{"role": "developer", "content": "x"}, HI], []),
        ([{"role": "system", "content": None}, HI], []),
        ([{"role": "developer", "content": []}, HI], []),
        ([HI, {"role": "system", "content": "x"}], []),
        ([{"role": "assistant", "content": "Hello!"}, HI], ["Hello!"]),
        ([HI, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}, HI], ["Hi", "a", "b"]),
        ([{"role": "user", "content": "a"}, HI], ["a"]),
        # Empty messages in the history.
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}, HI], ["a"]),
        ([{"role": "user", "content": []}, {"role": "user", "content": [{"type": "text", "text": " "}]}, HI], []),
        ([HI | {"name": None}], []),
        ([HI | {"name": "ada", "cache_control": {"type": "ephemeral"}}], []),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": None}]}], []),
        ([{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], []),
        # A message as other servers answer it.
        (
            [
                HI,
                {
                    "role": "assistant",
                    "content": "a",
                    "refusal": None,
                    "audio": None,
                    "annotations": [],
                    "function_call": None,
                    "tool_calls": None,
                    "reasoning_content": "thoughts",
                    "reasoning_details": [{"type": "reasoning.text", "text": "thoughts"}],
                },
                HI,
            ],
            ["Hi", "a"],
        ),
        ([HI, {"role": "assistant", "content": None, "refusal": "no"}, HI], ["Hi", "no"]),
        ([HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, HI], ["Hi", "no"]),
        *(
            (
                [
                    HI,
                    {"role": "assistant", "content": [{"type": type_, "text": "hm"}, {"type": "text", "text": "no"}]},
                    HI,
                ],
                ["Hi", "no"],
            )
            for type_ in ("thinking", "redacted_thinking", "reasoning")
        ),
        ([HI, CALLED | {"content": ""}, RESULT | {"content": ""}, HI], ["Hi", "", ""]),
        (
            [HI, CALLED | {"tool_calls": [CALL | {"index": 0}]}, RESULT | {"name": "f", "content": None}, HI],
            ["Hi", "", ""],
        ),
        ([HI, CALLED, RESULT | {"content": [{"type": "text", "text": "Bern"}]}, HI], ["Hi", "", "Bern"]),
        # One id in two turns.
        ([HI, CALLED, RESULT, HI, CALLED, RESULT, HI], ["Hi", "", "Bern", "Hi", "", "Bern"]),
    ],
)
def test_histories_of_other_clients_are_taken(messages: list[Any], history: list[str]) -> None:
    found = chat(*messages)
    assert (found.text, [turn.text for turn in found.history]) == ("Hi", history)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", ""), ('{"a":', '{"a":'), (None, "{}"), ({}, "{}"), ({"a": 1}, '{"a":1}')],
)
def test_arguments_of_an_earlier_call_may_be_cut_or_an_object(arguments: Any, expected: str) -> None:
    called = CALLED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": arguments}}]}
    found = chat(HI, called, RESULT)
    assert [call.arguments for call in found.since[0].calls] == [expected]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([HI, {"role": "assistant", "content": "a"}, {"role": "user", "content": ""}], "messages[2].content"),
        ([HI, {"role": "user", "content": [{"type": "input_audio"}]}], "messages[1].content[0].type"),
        ([{"role": "system", "content": [IMAGE]}, HI], "messages[0].content[0].type"),
        ([{"role": "user", "content": [IMAGE | {"image_url": {}}]}], "messages[0].content[0].image_url"),
        ([{"role": "user", "content": [IMAGE | {"image_url": "ftp://x"}]}], "messages[0].content[0].image_url"),
        (
            [{"role": "user", "content": [IMAGE | {"image_url": "http://10.0.0.1/"}]}],
            "messages[0].content[0].image_url",
        ),
        (
            [{"role": "user", "content": [IMAGE | {"image_url": "data:text/html;base64,AA=="}]}],
            "messages[0].content[0].image_url",
        ),
        # Not an image, an archive, not base64, and 5 MB and a byte.
        *(
            (
                [{"role": "user", "content": [IMAGE | {"image_url": f"data:image/png;base64,{data}"}]}],
                "messages[0].content[0].image_url",
            )
            for data in ("AA==", "UEsDBAAA", PNG[:-1], PNG[:20] + "A" * (5 * 1024**2 * 4 // 3))
        ),
        ([{"role": "user", "content": [IMAGE] * 21}], "messages"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "Hi"}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": {"text": "Hi"}}], "messages[0].content"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": " \n"}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([HI, HI, HI, {"role": "user", "content": "x" * 100_001}], "messages[3].content"),
        ([{"role": "system", "content": "x" * 100_001}, HI], "messages[0].content"),
        ([{"role": "critic", "content": "Hi"}], "messages[0].role"),
        ([HI, RESULT], "messages[1].tool_call_id"),
        ([HI, CALLED, RESULT, RESULT], "messages[3].tool_call_id"),
        ([HI, CALLED, RESULT | {"tool_call_id": ["1"]}], "messages[2].tool_call_id"),
        ([HI, CALLED, RESULT | {"content": 7}], "messages[2].content"),
        ([HI, CALLED, HI], "messages[2]"),
        ([HI, CALLED, {"role": "assistant", "content": "Well"}, HI], "messages[2]"),
        ([HI, CALLED | {"tool_calls": [CALL, CALL | {"id": "2"}]}, RESULT], "messages"),
        ([CALLED, RESULT], "messages"),
        ([HI, CALLED | {"tool_calls": CALL}], "messages[1].tool_calls"),
        ([HI, CALLED | {"tool_calls": ["f"]}], "messages[1].tool_calls[0]"),
        ([HI, CALLED | {"tool_calls": [CALL | {"type": "custom"}]}], "messages[1].tool_calls[0].type"),
        ([HI, CALLED | {"tool_calls": [CALL | {"id": ""}]}], "messages[1].tool_calls[0].id"),
        ([HI, CALLED | {"tool_calls": [CALL | {"id": 1}]}], "messages[1].tool_calls[0].id"),
        ([HI, CALLED | {"tool_calls": [CALL | {"function": "f"}]}], "messages[1].tool_calls[0].function"),
        (
            [HI, CALLED | {"tool_calls": [CALL | {"function": {"name": "f g", "arguments": "{}"}}]}],
            "messages[1].tool_calls[0].function.name",
        ),
        (
            [HI, CALLED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": 7}}]}],
            "messages[1].tool_calls[0].function.arguments",
        ),
        ([HI, CALLED | {"tool_calls": [CALL, CALL]}, RESULT], "messages[1]"),
        ([HI, {"role": "function", "name": "f", "content": "{}"}, HI], "messages[1].name"),
        ([HI, {"role": "assistant", "function_call": {"name": "f"}}, HI], "messages[2]"),
        ([HI, {"role": "assistant", "function_call": "f"}, HI], "messages[1].function_call"),
        ([HI, {"role": "assistant", "function_call": {"name": "f g"}}, HI], "messages[1].function_call.name"),
        (
            [HI, {"role": "assistant", "function_call": {"name": "f"}}, {"role": "function", "name": "g"}],
            "messages[2].name",
        ),
        ([HI, {"role": "assistant", "content": "Well"}], "messages"),
        ([{"role": "system", "content": " "}], "messages"),
    ],
)
def test_a_message_that_an_agent_cannot_take_is_named(messages: list[Any], param: str) -> None:
    with pytest.raises(CompletionError) as refused:
        chat(*messages)
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", "f"),
        ("n", 2),
        ("n", 0),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("stop", 7),
        ("stop", ["x"] * 17),
        ("max_tokens", 0),
        ("max_completion_tokens", 0),
        ("web_search_options", {"search_context_size": "low"}),
    ],
)
def test_what_would_change_the_shape_of_a_completion_is_refused(field: str, value: Any) -> None:
    with pytest.raises(CompletionError) as refused:
        chat(**{field: value})
    assert (refused.value.status, refused.value.error["param"]) == (400, field)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": ["f"]}, "functions[0]"),
        ({"functions": [{"name": "f"}, {"name": "f"}]}, "functions[1].name"),
        ({"functions": [{"name": "f", "parameters": 7}]}, "functions[0].parameters"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": {}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": 7}, "function_call"),
        ({"functions": [{"name": "f"}], "tools": [TOOL]}, "functions"),
        ({"stop": ["x", 7]}, "stop[1]"),
        ({"stop": ["x" * 257]}, "stop[0]"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}},
            "tool_choice.allowed_tools.tools",
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [function(name="g")]},
                },
            },
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
    ],
)
def test_a_part_of_an_option_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(CompletionError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


def test_thoughts_of_another_servers_model_are_left_out() -> None:
    thoughts = {"type": "reasoning", "id": "rs_1", "summary": []}
    answer = {"role": "assistant", "content": "Hello"}
    assert responses([HI, thoughts, answer, HI]) == responses([HI, answer, HI])


def test_a_reference_is_refused_with_the_way_to_send_its_item() -> None:
    with pytest.raises(CompletionError) as refused:
        responses([HI, {"type": "item_reference", "id": "msg_1"}, HI])
    assert "store: false" in str(refused.value.error["message"])


def test_images_and_files_in_the_result_of_a_function_are_left_out() -> None:
    png = "data:image/png;base64,iVBORw0KGgo="
    parts = [
        {"type": "input_text", "text": "The chart:"},
        {"type": "input_image", "image_url": png},
        {"type": "input_file", "file_id": "file_1"},
    ]
    text = "The chart:\n[image left out]\n[file left out]"
    assert responses([HI, FUNCTION_CALL, OUTPUT | {"output": parts}]) == responses(
        [HI, FUNCTION_CALL, OUTPUT | {"output": text}]
    )
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": {"url": png}}]}
    found = chat(HI, {"role": "assistant", "tool_calls": [call]}, result)
    assert found.since[-1].text == "[image left out]"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("input", [], "input"),
        ("input", 7, "input"),
        ("input", "", "input"),
        ("input", ["Hi"], "input[0]"),
        ("input", [HI, {"type": "item_reference", "id": "msg_1"}], "input[1].id"),
        ("input", [HI, OUTPUT], "input[1].call_id"),
        ("input", [HI, FUNCTION_CALL, OUTPUT | {"output": 7}], "input[2].output"),
        ("input", [HI, FUNCTION_CALL], "input"),
        ("input", [HI, FUNCTION_CALL, FUNCTION_CALL, OUTPUT], "input[1]"),
        ("input", [HI, FUNCTION_CALL | {"call_id": None}, OUTPUT], "input[1].call_id"),
        ("input", [HI, FUNCTION_CALL | {"name": "f g"}, OUTPUT], "input[1].name"),
        ("input", [HI, FUNCTION_CALL | {"arguments": 7}, OUTPUT], "input[1].arguments"),
        ("input", [FUNCTION_CALL, OUTPUT], "input"),
        (
            "input",
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0].image_url",
        ),
        ("input", [{"content": "Hi"}], "input[0].role"),
        ("instructions", "x" * 100_001, "instructions"),
        ("tools", [{"type": "web_search"}], "tools[0].type"),
        ("tools", [{"type": "function"}], "tools[0].name"),
        ("tools", [{"type": "function", "name": "f", "parameters": {"type": "array"}}], "tools[0].parameters.type"),
        ("tool_choice", {"type": "function", "name": "f"}, "tool_choice.name"),
        ("reasoning", {"effort": "High\n"}, "reasoning.effort"),
        ("text", "json", "text"),
        ("previous_response_id", "resp_1", "previous_response_id"),
        ("conversation", "conv_1", "conversation"),
        ("prompt", {"id": "pmpt_1"}, "prompt"),
        ("background", True, "background"),
        ("top_logprobs", 2, "top_logprobs"),
    ],
)
def test_what_would_change_the_shape_of_a_response_is_refused(field: str, value: Any, param: str) -> None:
    with pytest.raises(CompletionError) as refused:
        responses(**{"input_": "Hi"} | {"input_" if field == "input" else field: value})
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def test_a_format_is_what_the_answer_has_to_fit() -> None:
    city = {"name": "city", "schema": CITY, "strict": True}
    formats: list[tuple[str, dict[str, Any], dict[str, Any] | None]] = [
        ("text", {}, None),
        ("json_object", {}, {"type": "object"}),
        ("json_schema", city, CITY),
    ]
    for type_, fields, schema in formats:
        found = CompletionRequest("Hi", [], None, schema)
        assert chat(response_format={"type": type_, "json_schema": fields}) == found
        assert responses(text={"format": {"type": type_} | fields, "verbosity": "low"}) == found


def test_the_root_of_a_format_may_be_a_reference() -> None:
    schema = {"$ref": "#/$defs/city", "$defs": {"city": CITY}}
    for strict in (True, False):
        given = {"name": "city", "schema": schema, "strict": strict}
        found = chat(response_format={"type": "json_schema", "json_schema": given}).output_schema
        assert found == responses(text={"format": {"type": "json_schema"} | given}).output_schema
        assert found == (schema if strict else schema | {"type": "object"})


@pytest.mark.parametrize(
    ("format_", "where"),
    [
        ("json", ""),
        ({}, ".type"),
        ({"type": "grammar"}, ".type"),
        ({"type": "json_schema", "schema": CITY}, ".name"),
        ({"type": "json_schema", "name": "a city", "schema": CITY}, ".name"),
        ({"type": "json_schema", "name": "x" * 65, "schema": CITY}, ".name"),
        ({"type": "json_schema", "name": "city\n", "schema": CITY}, ".name"),
        ({"type": "json_schema", "name": "city"}, ".schema"),
        ({"type": "json_schema", "name": "city", "schema": "object"}, ".schema"),
        ({"type": "json_schema", "name": "city", "schema": {"type": "string"}}, ".schema.type"),
        (
            {"type": "json_schema", "name": "city", "schema": {"$ref": "#/x", "x": {"type": "string"}}, "strict": True},
            ".schema.type",
        ),
        (
            {"type": "json_schema", "name": "city", "schema": CITY | {"properties": {"a": {"type": "text"}}}},
            ".schema.properties.a.type",
        ),
    ],
)
def test_a_format_that_cannot_be_taken_is_named(format_: Any, where: str) -> None:
    with pytest.raises(CompletionError) as refused:
        responses(text={"format": format_})
    assert (refused.value.status, refused.value.error["param"]) == (400, f"text.format{where}")
    if is_schema := isinstance(format_, dict) and format_.get("type") == "json_schema":
        format_ = {"type": "json_schema", "json_schema": {**format_, "type": "object"}}
    with pytest.raises(CompletionError) as refused:
        chat(response_format=format_)
    param = f"response_format{'.json_schema' if is_schema else ''}{where}"
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("part", "newer"),
    [
        ({"items": [{"type": "number"}]}, {"prefixItems": [{"type": "number"}]}),
        ({"minimum": 1, "exclusiveMinimum": True}, {"exclusiveMinimum": 1}),
        ({"patternProperties": {"^x": {}}}, {}),
    ],
)
def test_a_format_that_is_not_strict_may_be_of_an_older_draft(part: dict[str, Any], newer: dict[str, Any]) -> None:
    old, new = ({"type": "object", "properties": {"a": one}} for one in (part, newer))
    for strict in ({}, {"strict": False}, {"strict": None}):
        format_ = {"name": "x", "schema": old, **strict}
        assert responses(text={"format": {"type": "json_schema"} | format_}).output_schema == new
        assert chat(response_format={"type": "json_schema", "json_schema": format_}).output_schema == new
    with pytest.raises(CompletionError, match=r"must|not supported"):
        responses(text={"format": {"type": "json_schema", "name": "x", "schema": old, "strict": True}})


def test_a_json_schema_without_its_fields_is_named() -> None:
    with pytest.raises(CompletionError) as refused:
        chat(response_format={"type": "json_schema"})
    assert refused.value.error["param"] == "response_format.json_schema"


LARGE = {"type": "object", "description": "x" * 32_000}
PLACE = {"name": "place", "description": "Where.", "parameters": CITY, "strict": True}
TIME = {"name": "time"}


def offered(*functions: Any, **fields: Any) -> CompletionRequest:
    return chat(tools=[{"type": "function", "function": function} for function in functions], **fields)


def test_tools_are_offered_as_the_choice_says() -> None:
    place = ClientFunction("place", "Where.", CITY, True)
    time = ClientFunction("time", "", {"type": "object", "properties": {}})
    both = (place, time)
    for choice, tools, must_call in (
        (None, both, False),
        ("auto", both, False),
        ("none", (), False),
        ("required", both, True),
        ({"type": "function", "function": {"name": "time"}}, (time,), True),
        # Words and shapes of Mistral, Anthropic, TGI and of the other API.
        ("any", both, True),
        ({"type": "auto"}, both, False),
        ({"type": "none"}, (), False),
        ({"type": "any", "disable_parallel_tool_use": False}, both, True),
        ({"type": "tool", "name": "time"}, (time,), True),
        ("time", (time,), True),
        ({"type": "function", "name": "time"}, (time,), True),
        ({"type": "allowed_tools", "mode": "auto", "tools": [TIME]}, (time,), False),
    ):
        for parallel in (None, True, False):
            found = offered(PLACE, TIME, tool_choice=choice, parallel_tool_calls=parallel)
            assert (found.tools, found.must_call, found.parallel) == (tools, must_call, parallel is not False)


def test_functions_are_taken_in_the_form_of_the_other_api() -> None:
    flat, nested = {"type": "function"} | PLACE, {"type": "function", "function": PLACE}
    assert chat(tools=[flat]) == offered(PLACE) == responses(tools=[nested])
    assert chat(tools=[{"name": "place", "description": "Where.", "input_schema": CITY}]) == offered(
        {name: value for name, value in PLACE.items() if name != "strict"}
    )
    chosen = {"type": "function", "function": {"name": "place"}}
    assert responses(tools=[nested], tool_choice=chosen) == offered(PLACE, tool_choice=chosen)
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [flat]}}
    assert responses(tools=[flat], tool_choice=allowed) == offered(PLACE, tool_choice="required")


def test_calls_and_their_results_are_told_each_with_its_call() -> None:
    call = FunctionCall("1", "f", "{}")
    called = Earlier("assistant", "", (call,))
    result = Earlier("tool", "Bern", call=call)
    assert chat(HI, CALLED, RESULT) == CompletionRequest("Hi", [], None, since=(called, result))
    assert chat(HI, CALLED, RESULT, {"role": "user", "content": "Bye"}) == CompletionRequest(
        "Bye", [Earlier("user", "Hi"), called, result], None
    )
    other = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "x"}}
    # In any order, and with the text that the model wrote before.
    assert chat(
        HI,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, other]},
        {
            "role": "tool",
            "tool_call_id": "2",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {"role": "system", "content": "Be brief."},
        RESULT | {"content": ""},
        CALLED,
        RESULT,
    ) == CompletionRequest(
        "Hi",
        [],
        "Be brief.",
        since=(
            Earlier("assistant", "Let me see.", (call, FunctionCall("2", "g", "x"))),
            Earlier("tool", "a\nb", call=FunctionCall("2", "g", "x")),
            Earlier("tool", "", call=call),
            called,
            result,
        ),
    )


def test_the_items_of_a_response_are_the_same_conversation() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]}
    other = FUNCTION_CALL | {"call_id": "2", "name": "g", "arguments": "x"}
    output = OUTPUT | {"call_id": "2", "output": [{"type": "input_text", "text": "a"}]}
    other_call = {"id": "2", "type": "function", "function": {"name": "g", "arguments": "x"}}
    assert responses([HI, said, FUNCTION_CALL, other, output, OUTPUT, FUNCTION_CALL, OUTPUT]) == chat(
        HI,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, other_call]},
        {"role": "tool", "tool_call_id": "2", "content": "a"},
        RESULT,
        CALLED,
        RESULT,
    )
    tools = [{"type": "function"} | PLACE, {"type": "function"} | TIME]
    for chosen in ("none", "required", None):
        assert responses(tools=tools, tool_choice=chosen) == offered(PLACE, TIME, tool_choice=chosen)
    assert responses(
        tools=tools, tool_choice={"type": "function", "name": "time"}, parallel_tool_calls=False
    ) == offered(TIME, tool_choice="required", parallel_tool_calls=False)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "place"}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [function(name=f"f{n}", parameters=LARGE) for n in range(5)]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools[1].function.name"),
        ({"tools": ["place"]}, "tools[0]"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "name": "x", "parameters": 7}]}, "tools[0].parameters"),
        ({"tools": [function()]}, "tools[0].function.name"),
        ({"tools": [TOOL, function(name="a place")]}, "tools[1].function.name"),
        ({"tools": [function(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [function(name="x", description=7)]}, "tools[0].function.description"),
        ({"tools": [function(name="x", description="\ud800")]}, "tools[0].function.description"),
        ({"tools": [function(name="x", strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [function(name="x", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [function(name="x", parameters={"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "some"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {}}, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": ["any"]}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": function(name="x")}, "tool_choice.function.name"),
        ({"tools": [TOOL], "tool_choice": function(name=["f"])}, "tool_choice.function.name"),
    ],
)
def test_tools_that_cannot_be_offered_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(CompletionError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.error["param"]) == (400, param)


EMPTY = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    "function_",
    [
        {"name": "now"},
        {"name": "now", "parameters": None},
        {"name": "now", "parameters": {}},
        {"name": "now", "parameters": {"properties": {}}},
        {"name": "now", "parameters": {"type": "object", "required": None}},
        {"name": "now", "parameters": {"type": None}, "strict": None},
    ],
)
def test_a_function_without_parameters_takes_an_empty_object(function_: dict[str, Any]) -> None:
    asked = chat(tools=[{"type": "function", "function": function_}])
    assert [tool.parameters for tool in asked.tools] == [EMPTY]
    asked = responses(tools=[{"type": "function", **function_}])
    assert [tool.parameters for tool in asked.tools] == [EMPTY]


def test_a_type_that_says_nothing_may_be_absent_or_null() -> None:
    for type_ in ({}, {"type": None}):
        tool = {**type_, "function": {"name": "now"}}
        called = CALLED | {"tool_calls": [{**type_, "id": CALL["id"], "function": CALL["function"]}]}
        asked = chat(HI, called, RESULT, tools=[tool])
        assert ([one.name for one in asked.tools], len(asked.since[0].calls)) == (["now"], 1)
        assert responses(input=[{**type_, "role": "user", "content": "Hi"}]).text == "Hi"


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"pair": {"type": "array", "items": [{"type": "string"}, {"type": "number"}]}}},
        {"properties": {"n": {"type": "number", "minimum": 0, "exclusiveMinimum": True}}},
        {"properties": {"a": {"$ref": "#/definitions/A"}}, "definitions": {"A": {"type": "string"}}},
        {"patternProperties": {"^x-": {"type": "string"}}},
        {"properties": {"name": {"type": "string", "pattern": r"^\p{L}+$"}}},
        {"properties": {"one": {"enum": [f"value number {n}" for n in range(2_000)]}}},
    ],
    ids=["tuple", "boolean exclusiveMinimum", "definitions", "patternProperties", "Unicode class", "40 KB"],
)
def test_a_function_may_have_any_schema_unless_it_is_strict(schema: dict[str, Any]) -> None:
    [tool] = chat(tools=[function(name="f", parameters=schema)]).tools
    assert tool.parameters == {"properties": {}} | schema | {"type": "object"}
