"""Requests in OpenAI's shapes, and their conversion into a conversation for the agent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, Field

from services.ws_gateway.openai.conversation import (
    ClientFunction,
    CompletionRequest,
    Constraints,
    FunctionCall,
    Turn,
    conversation,
)
from services.ws_gateway.openai.errors import invalid_field
from services.ws_gateway.openai.fields import check, check_name, list_of, string
from services.ws_gateway.openai.functions import function_of, output_schema, tools_of
from services.ws_gateway.openai.references import SEND_ITEM

MAX_MESSAGES = 1_000
MAX_STOPS = 16
MAX_STOP = 256
_NO_LOGPROBS = "is not supported: an answer has no log probabilities"

_Probability = Annotated[float | None, Field(ge=0, le=1)]
_Temperature = Annotated[float | None, Field(ge=0, le=2)]
_Penalty = Annotated[float | None, Field(ge=-2, le=2)]
_Tokens = Annotated[int | None, Field(ge=-1, le=10_000_000, description="-1: no limit.")]
_Effort = Annotated[str | None, Field(pattern="^[a-z]{1,20}$")]


class _Message(BaseModel):
    role: str
    name: Any = None
    content: Any = None
    refusal: Any = None
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
    functions: Any = Field(default=None, description="Functions as before there were tools.")
    function_call: Any = None
    max_tokens: _Tokens = None
    max_completion_tokens: _Tokens = None
    stop: Any = Field(default=None, description=f"A text that ends the answer, or up to {MAX_STOPS} of them.")
    temperature: _Temperature = None
    top_p: _Probability = None
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    reasoning_effort: _Effort = None
    logprobs: Any = None
    top_logprobs: Any = None
    modalities: Any = None
    audio: Any = None
    web_search_options: Any = None

    def to_conversation(self) -> CompletionRequest:
        """Raises Failure naming the invalid field."""
        _refuse(self, "logprobs top_logprobs", _NO_LOGPROBS)
        _refuse(self, "audio web_search_options", "is not supported")
        check(self.n in (None, 1), "n", "only 1 is supported")
        check(self.modalities in (None, [], ["text"]), "modalities", "only text is supported")
        check(not (self.functions and self.tools), "functions", "must not be given beside tools")
        turns = []
        # By the function's name, the id that its call without one was given.
        ids: dict[str, str] = {}
        for n, message in enumerate(self.messages):
            where = f"messages[{n}]"
            given = list_of(message.tool_calls, f"{where}.tool_calls")
            calls = [_chat_call(call, f"{where}.tool_calls[{m}]") for m, call in enumerate(given)]
            if message.function_call:
                calls.append(_old_call(message.function_call, n, where))
                ids = {calls[-1].name: calls[-1].id}
            if message.role == "function":
                id_ = ids.get(message.name) if isinstance(message.name, str) else None
                turns.append(Turn(where, "tool", message.content, answers=id_, answers_field=".name"))
            else:
                # OpenAI tells of a refusal beside the content, which is null.
                is_refusal = message.role == "assistant" and not message.content and isinstance(message.refusal, str)
                content = message.refusal if is_refusal else message.content
                answers = message.tool_call_id
                turns.append(Turn(where, message.role, content, calls=tuple(calls), answers=answers))
        constraints = Constraints(
            output_schema(self.response_format, "response_format", nested="json_schema"),
            *self._tools(),
            # An answer in the old shape has one call.
            parallel=self.parallel_tool_calls is not False and not self.functions,
            sampling=self._sampling(),
        )
        return conversation("messages", turns, constraints)

    def _tools(self) -> tuple[tuple[ClientFunction, ...], bool]:
        if not self.functions:
            return tools_of(self.tools, self.tool_choice, nested="function")
        functions = list_of(self.functions, "functions")
        given = [{**one, "type": "function"} if isinstance(one, dict) else one for one in functions]
        choice = self.function_call
        choice = {**choice, "type": "function"} if isinstance(choice, dict) else choice
        return tools_of(given, choice, fields=("functions", "function_call"))

    def _sampling(self) -> dict[str, Any]:
        names = "temperature top_p presence_penalty frequency_penalty seed reasoning_effort"
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        field = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return _sampling(self, names, _limit(limit, field), _stops(self.stop))


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
    max_output_tokens: _Tokens = None
    temperature: _Temperature = None
    top_p: _Probability = None
    reasoning: Any = None
    metadata: Any = None
    top_logprobs: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None

    def to_conversation(self) -> CompletionRequest:
        """Raises Failure naming the invalid field."""
        _refuse(self, "previous_response_id conversation", "is not supported: send the whole conversation")
        _refuse(self, "prompt background", "is not supported")
        _refuse(self, "top_logprobs", _NO_LOGPROBS)
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
            sampling=self._sampling(),
        )
        return conversation("input", turns, constraints)

    def _sampling(self) -> dict[str, Any]:
        limit = _limit(self.max_output_tokens, "max_output_tokens")
        effort = self.reasoning.get("effort") if isinstance(self.reasoning, dict) else None
        is_effort = isinstance(effort, str) and re.fullmatch("[a-z]{1,20}", effort)
        check(effort in (None, "") or bool(is_effort), "reasoning.effort", "must have 1 to 20 small letters")
        return _sampling(self, "temperature top_p", limit, ()) | ({"reasoning_effort": effort} if effort else {})

    def echoed(self) -> dict[str, Any]:
        """The fields of the request that the answer repeats."""
        return {
            "instructions": self.instructions,
            "metadata": self.metadata or {},
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_output_tokens": self.max_output_tokens,
            "text": {"format": self._format() or {"type": "text"}},
            "tools": self.tools or [],
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
        }

    def _format(self) -> Any:
        return (self.text or {}).get("format")


def _item(item: Mapping[str, Any], where: str) -> Turn:
    """An item of the input of a response."""
    match item.get("type") or "message":
        case "message":
            return Turn(where, item.get("role"), item.get("content"))
        case "function_call":
            call = _call(item.get("call_id"), f"{where}.call_id", item, where)
            return Turn(where, "assistant", None, calls=(call,))
        case "function_call_output":
            output, id_ = item.get("output"), item.get("call_id")
            return Turn(where, "tool", output, field=".output", answers=id_, answers_field=".call_id")
        case "item_reference":
            raise invalid_field(f"{where}.id", f"refers to no answer that is still kept: {SEND_ITEM}")
    raise invalid_field(f"{where}.type", "only message, function_call and function_call_output are supported")


def _chat_call(given: Any, where: str) -> FunctionCall:
    function, inner = function_of(given, where, "function")
    return _call(given.get("id"), f"{where}.id", function, inner)


def _old_call(given: Any, n: int, where: str) -> FunctionCall:
    """The call of a message from before there were tools."""
    check(isinstance(given, dict), f"{where}.function_call", "must be an object")
    return _call(f"call_{n}", "", given, f"{where}.function_call")


def _limit(given: int | None, field: str) -> int | None:
    check(given != 0, field, "must be 1 or more")
    return None if given == -1 else given


def _stops(given: Any) -> tuple[str, ...]:
    listed = list_of([given] if isinstance(given, str) else given, "stop")
    check(len(listed) <= MAX_STOPS, "stop", f"must have {MAX_STOPS} texts at most")
    for n, one in enumerate(listed):
        check(len(string(one, f"stop[{n}]")) <= MAX_STOP, f"stop[{n}]", f"must have {MAX_STOP} characters at most")
    return tuple(one for one in listed if one)


def _sampling(body: BaseModel, names: str, limit: int | None, stops: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `CompletionRequest.sampling` that are given."""
    given = {name: getattr(body, name) for name in names.split()} | {"max_output_tokens": limit, "stop": stops or None}
    return {name: value for name, value in given.items() if value is not None}


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
