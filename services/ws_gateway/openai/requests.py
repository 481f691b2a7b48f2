"""Requests in OpenAI's shapes, and their conversion into a conversation for the agent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from pydantic import BaseModel, Field

from services.ws_gateway.openai.conversation import (
    OLD,
    CompletionRequest,
    Constraints,
    FunctionCall,
    Turn,
    conversation,
)
from services.ws_gateway.openai.errors import invalid_field
from services.ws_gateway.openai.fields import check, check_name, list_of, string
from services.ws_gateway.openai.functions import function_of, output_schema, tools_of

MAX_MESSAGES = 1_000


class _Message(BaseModel):
    role: str
    content: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``. Other fields are ignored."""

    model: str = Field(description="An agent's id.")
    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, description="Only 1.")
    response_format: Any = None
    tools: Any = Field(default=None, description="Functions, besides the agent's own tools.")
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    modalities: Any = None
    audio: Any = None
    stop: Any = None
    web_search_options: Any = None

    def to_conversation(self) -> CompletionRequest:
        """Raises Failure naming the invalid field."""
        _refuse(self, "functions function_call", OLD)
        _refuse(self, "logprobs top_logprobs audio stop web_search_options", "is not supported")
        check(self.n in (None, 1), "n", "only 1 is supported")
        check(self.modalities in (None, [], ["text"]), "modalities", "only text is supported")
        turns = []
        for n, message in enumerate(self.messages):
            where = f"messages[{n}]"
            check(not message.function_call, f"{where}.function_call", OLD)
            calls = list_of(message.tool_calls, f"{where}.tool_calls")
            turns.append(
                Turn(
                    where,
                    message.role,
                    message.content,
                    calls=tuple(_chat_call(call, f"{where}.tool_calls[{m}]") for m, call in enumerate(calls)),
                    answers=message.tool_call_id,
                )
            )
        constraints = Constraints(
            output_schema(self.response_format, "response_format", nested="json_schema"),
            *tools_of(self.tools, self.tool_choice, nested="function"),
            parallel=self.parallel_tool_calls is not False,
        )
        return conversation("messages", turns, constraints)


class ResponsesRequest(BaseModel):
    """The body of ``POST /v1/responses``. Other fields are ignored."""

    model: str = Field(description="An agent's id.")
    input: Any = Field(description="Text, or a list of messages.")
    instructions: str | None = None
    stream: bool | None = None
    tools: Any = Field(default=None, description="Functions, besides the agent's own tools.")
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: Any = None
    top_logprobs: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None

    def to_conversation(self) -> CompletionRequest:
        """Raises Failure naming the invalid field."""
        _refuse(self, "previous_response_id conversation", "is not supported: send the whole conversation")
        _refuse(self, "prompt background top_logprobs", "is not supported")
        check(self.text is None or isinstance(self.text, dict), "text", "must be an object")
        turns = [Turn("instructions", "system", self.instructions, field="")]
        if isinstance(self.input, str):
            turns.append(Turn("input", "user", self.input, field=""))
        else:
            check(isinstance(self.input, list), "input", "must be text or a list of messages")
            check(0 < len(self.input) <= MAX_MESSAGES, "input", f"must have 1 to {MAX_MESSAGES} items")
            for n, item in enumerate(self.input):
                check(isinstance(item, dict), f"input[{n}]", "must be a message")
                if item.get("type") == "reasoning":
                    # The thoughts of another server's model: nothing that this agent could go on from.
                    continue
                turn = _item(item, f"input[{n}]")
                if turn.calls and turns[-1].role == "assistant":
                    # In this API, the calls of one turn and the text before them are separate items.
                    turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, *turn.calls))
                else:
                    turns.append(turn)
        constraints = Constraints(
            output_schema(self._format(), "text.format"),
            *tools_of(self.tools, self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
        )
        return conversation("input", turns, constraints)

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that the answer repeats."""
        return {
            "instructions": self.instructions,
            "text": {"format": self._format() or {"type": "text"}},
            "tools": self.tools or [],
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }

    def _format(self) -> Any:
        return (self.text or {}).get("format")


def _item(item: Mapping[str, Any], where: str) -> Turn:
    """An item of the input of a response."""
    match item.get("type", "message"):
        case "message":
            return Turn(where, item.get("role"), item.get("content"))
        case "function_call":
            call = _call(item.get("call_id"), f"{where}.call_id", item, where)
            return Turn(where, "assistant", None, calls=(call,))
        case "function_call_output":
            output, id_ = item.get("output"), item.get("call_id")
            return Turn(where, "tool", output, field=".output", answers=id_, answers_field=".call_id")
    raise invalid_field(f"{where}.type", "only message, function_call and function_call_output are supported")


def _chat_call(given: Any, where: str) -> FunctionCall:
    function, inner = function_of(given, where, "function")
    return _call(given.get("id"), f"{where}.id", function, inner)


def _call(id_: Any, where_id: str, function: Mapping[str, Any], where: str) -> FunctionCall:
    check(bool(string(id_, where_id)), where_id, "must not be empty")
    check_name(function.get("name"), f"{where}.name")
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, dict):
        # As some servers write them, whose answers a client sends back.
        try:
            arguments = msgspec.json.encode(arguments or {}).decode()
        except (RecursionError, UnicodeEncodeError):
            raise invalid_field(f"{where}.arguments", "must be JSON of valid text, and not nested so deeply") from None
    return FunctionCall(id_, function["name"], string(arguments, f"{where}.arguments"))


def _refuse(body: BaseModel, names: str, reason: str) -> None:
    for name in names.split():
        check(not getattr(body, name), name, reason)
