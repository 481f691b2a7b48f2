"""Checks requests and makes answers in the shapes of OpenAI's chat completions and Anthropic's messages.

Sources: https://platform.openai.com/docs/api-reference/chat and https://docs.anthropic.com/en/api/messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

Calls = Sequence[tuple[str, str]]
Usage = tuple[int, int, int, int] | None

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_OPENAI_FIELDS = (
    "model messages stream stream_options tools tool_choice max_completion_tokens max_tokens temperature top_p "
    "parallel_tool_calls stop seed user response_format presence_penalty frequency_penalty reasoning_effort"
)
_ANTHROPIC_FIELDS = (
    "model messages system max_tokens stream tools tool_choice temperature top_p metadata stop_sequences"
)


class Refused(Exception):
    """The request does not follow the provider's documents."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Shape(Protocol):
    """The wire format of one provider."""

    def check(self, headers: Mapping[str, str], body: Any, key: str) -> None: ...
    def reports_usage(self, body: Mapping[str, Any]) -> bool: ...
    def error(self, status: int, message: str) -> dict[str, Any]: ...
    def whole(self, model: str, text: str, calls: Calls, usage: Usage) -> dict[str, Any]: ...
    def events(self, model: str, pieces: Sequence[str], calls: Calls, usage: Usage) -> Iterator[str]: ...


def _is_parts(content: Any) -> bool:
    """Text and images, as OpenAI takes them."""
    return isinstance(content, list) and all(
        isinstance(part, dict)
        and (
            (part.get("type") == "text" and isinstance(part.get("text"), str))
            or (part.get("type") == "image_url" and isinstance(part["image_url"].get("url"), str))
        )
        for part in content
    )


def _need(holds: object, reason: str, status: int = 400) -> None:
    if not holds:
        raise Refused(status, reason)


def _check_tool(name: object, schema: Any, not_at_the_root: Sequence[str]) -> None:
    _need(isinstance(name, str) and _NAME.fullmatch(name), f"tool name {name!r}")
    _need(isinstance(schema, dict) and schema.get("type") == "object", f"schema of {name}: must be of type object")
    _need(schema.keys().isdisjoint(not_at_the_root), f"schema of {name}: has one of {not_at_the_root} at the top level")


def _check_items(name: object, schema: Any) -> None:
    if isinstance(schema, list):
        for part in schema:
            _check_items(name, part)
    elif isinstance(schema, dict):
        types = schema.get("type")
        is_array = types == "array" or (isinstance(types, list) and "array" in types)
        _need(not is_array or "items" in schema, f"schema of {name}: array schema missing items")
        for part in schema.values():
            _check_items(name, part)


def _check_calls_answered(open_calls: set[str]) -> None:
    _need(not open_calls, f"tool calls without an answer: {sorted(open_calls)}")


class _OpenAI:
    def check(self, headers: Mapping[str, str], body: Any, key: str) -> None:
        given = headers.get("authorization")
        _need(given == f"Bearer {key}", f"authorization {given!r}", 401)
        _need(headers.get("content-type", "").startswith("application/json"), "content-type", 415)
        _need(isinstance(body, dict) and body.keys() <= set(_OPENAI_FIELDS.split()), f"fields {sorted(body)}")
        _need(isinstance(body.get("model"), str) and body["model"], "model")
        _need(isinstance(body.get("messages"), list) and body["messages"], "messages")
        _need("stream_options" not in body or body.get("stream") is True, "stream_options without stream")
        for tool in body.get("tools", ()):
            _need(tool.get("type") == "function", "type of a tool")
            name, schema = tool["function"].get("name"), tool["function"].get("parameters")
            _check_tool(name, schema, ("oneOf", "anyOf", "allOf", "enum", "not"))
            _check_items(name, schema)
        open_calls: set[str] = set()
        for n, message in enumerate(body["messages"]):
            role, content = message.get("role"), message.get("content")
            if role == "tool":
                _need(message.get("tool_call_id") in open_calls, "a tool's answer to no call")
                open_calls.remove(message["tool_call_id"])
                _need(isinstance(content, str), "content of a tool's answer")
                continue
            _check_calls_answered(open_calls)
            _need(role in ("user", "assistant") or (role in ("system", "developer") and n == 0), f"role {role} at {n}")
            calls = message.get("tool_calls", [])
            _need(
                isinstance(content, str) or (role == "assistant" and calls) or (role == "user" and _is_parts(content)),
                f"content of message {n}",
            )
            for call in calls:
                _need(call.get("type") == "function" and isinstance(call["function"]["arguments"], str), "tool_calls")
                open_calls.add(call["id"])
        _check_calls_answered(open_calls)

    def reports_usage(self, body: Mapping[str, Any]) -> bool:
        return bool(body.get("stream_options", {}).get("include_usage"))

    def error(self, status: int, message: str) -> dict[str, Any]:
        return {"error": {"message": message, "type": "invalid_request_error" if status < 500 else "server_error"}}

    def whole(self, model: str, text: str, calls: Calls, usage: Usage) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text or None}
        if calls:
            message["tool_calls"] = [_openai_call(n, call) for n, call in enumerate(calls)]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
        base = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}
        return base | ({"usage": _openai_usage(usage)} if usage else {})

    def events(self, model: str, pieces: Sequence[str], calls: Calls, usage: Usage) -> Iterator[str]:
        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": model}
            return f"data: {json.dumps(base | {'choices': choices} | more, ensure_ascii=False)}\n\n"

        def choice(delta: dict[str, Any], finish: str | None = None) -> list[dict[str, Any]]:
            return [{"index": 0, "delta": delta, "finish_reason": finish}]

        yield chunk(choice({"role": "assistant", "content": ""}))
        for piece in pieces:
            yield chunk(choice({"content": piece}))
        for n, call in enumerate(calls):
            made = _openai_call(n, call)
            arguments = made["function"]["arguments"]
            begun = made | {"index": n, "function": made["function"] | {"arguments": ""}}
            yield chunk(choice({"tool_calls": [begun]}))
            # In two parts: the real provider cuts the JSON anywhere.
            for part in (arguments[: len(arguments) // 2], arguments[len(arguments) // 2 :]):
                yield chunk(choice({"tool_calls": [{"index": n, "function": {"arguments": part}}]}))
        yield chunk(choice({}, "tool_calls" if calls else "stop"))
        if usage:
            yield chunk([], usage=_openai_usage(usage))
        yield "data: [DONE]\n\n"


def _openai_call(n: int, call: tuple[str, str]) -> dict[str, Any]:
    return {"id": f"call_{n}", "type": "function", "function": {"name": call[0], "arguments": call[1]}}


def _openai_usage(usage: tuple[int, int, int, int]) -> dict[str, Any]:
    prompt, cached, completion, reasoning = usage
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


class _Anthropic:
    def check(self, headers: Mapping[str, str], body: Any, key: str) -> None:
        _need(headers.get("x-api-key") == key, "x-api-key", 401)
        _need(headers.get("anthropic-version"), "anthropic-version")
        _need(isinstance(body, dict) and body.keys() <= set(_ANTHROPIC_FIELDS.split()), f"fields {sorted(body)}")
        _need(isinstance(body.get("model"), str) and body["model"], "model")
        _need(isinstance(body.get("max_tokens"), int) and body["max_tokens"] > 0, "max_tokens")
        for tool in body.get("tools", ()):
            _check_tool(tool.get("name"), tool.get("input_schema"), ("oneOf", "allOf", "anyOf"))
        messages = body.get("messages")
        _need(isinstance(messages, list) and messages and messages[0]["role"] == "user", "messages")
        open_calls: set[str] = set()
        for message in messages:
            _need(message.get("role") in ("user", "assistant"), "role")
            blocks = message["content"] if isinstance(message["content"], list) else []
            for block in blocks:
                if block["type"] == "tool_result":
                    _need(block["tool_use_id"] in open_calls, "a result of no call")
                    open_calls.remove(block["tool_use_id"])
            _check_calls_answered(open_calls)
            open_calls |= {block["id"] for block in blocks if block["type"] == "tool_use"}
        _check_calls_answered(open_calls)

    def reports_usage(self, body: Mapping[str, Any]) -> bool:
        return True

    def error(self, status: int, message: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": "api_error", "message": message}}

    def whole(self, model: str, text: str, calls: Calls, usage: Usage) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
        content += [_tool_use(n, call) | {"input": json.loads(call[1])} for n, call in enumerate(calls)]
        end = {"stop_reason": "tool_use" if calls else "end_turn", "content": content}
        return _message(model) | end | ({"usage": _anthropic_usage(usage)} if usage else {})

    def events(self, model: str, pieces: Sequence[str], calls: Calls, usage: Usage) -> Iterator[str]:
        def event(type_: str, **data: Any) -> str:
            return f"event: {type_}\ndata: {json.dumps({'type': type_} | data, ensure_ascii=False)}\n\n"

        begun = _anthropic_usage(usage) | {"output_tokens": 1} if usage else {}
        yield event("message_start", message=_message(model) | {"usage": begun})
        if pieces:
            yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
            for piece in pieces:
                yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
            yield event("content_block_stop", index=0)
        for n, call in enumerate(calls):
            index = n + bool(pieces)
            yield event("content_block_start", index=index, content_block=_tool_use(n, call))
            delta = {"type": "input_json_delta", "partial_json": call[1]}
            yield event("content_block_delta", index=index, delta=delta)
            yield event("content_block_stop", index=index)
        stop = {"stop_reason": "tool_use" if calls else "end_turn", "stop_sequence": None}
        yield event("message_delta", delta=stop, usage={"output_tokens": usage[2]} if usage else {})
        yield event("message_stop")


def _message(model: str) -> dict[str, Any]:
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None}


def _tool_use(n: int, call: tuple[str, str]) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{n}", "name": call[0], "input": {}}


def _anthropic_usage(usage: tuple[int, int, int, int]) -> dict[str, Any]:
    prompt, cached, completion, _ = usage
    # Anthropic does not count cached tokens as input.
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion,
    }


OPENAI: Shape = _OpenAI()
ANTHROPIC: Shape = _Anthropic()
