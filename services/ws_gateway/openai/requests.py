"""Requests in OpenAI's shapes, and their conversion into a conversation for the agent."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import msgspec
from pydantic import BaseModel, Field

from infra.errors import InvalidMessage
from infra.stores import filetypes
from infra.web.json_schema import check_schema
from services.ws_gateway.openai.errors import invalid_field

MAX_MESSAGES = 1_000
MAX_TEXT = 100_000
MAX_TOOLS = 128
# The most bytes of all tools' parameters together: the check of the schemas takes time.
MAX_PARAMETERS = 128 * 1024
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

# The text parts of a content, and the field that has the text.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# The image parts of a content: the field is the address, or in chat completions an object that has it.
_IMAGES = ("image_url", "input_image")
_DATA_URL = re.compile(r"data:image/[a-z]+;base64,([A-Za-z0-9+/]+={0,2})")
_IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")
# The type stands in the first bytes. The number of characters is a multiple of four, as base64 needs.
_HEAD = 64
MAX_IMAGE_BYTES = 5 * 1024 * 1024
MAX_IMAGES = 20
# The text of a message that has only images.
NO_TEXT = "[image]"
_OLD = "is not supported: use tools"


class _Message(BaseModel):
    role: str
    content: Any = None
    tool_calls: Any = None
    tool_call_id: Any = None
    function_call: Any = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


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

    def to_conversation(self) -> Conversation:
        """Raises Failure naming the invalid field."""
        _refuse(self, "functions function_call", _OLD)
        _refuse(self, "logprobs top_logprobs audio stop web_search_options", "is not supported")
        _check(self.n in (None, 1), "n", "only 1 is supported")
        _check(self.modalities in (None, [], ["text"]), "modalities", "only text is supported")
        turns = []
        for n, message in enumerate(self.messages):
            where = f"messages[{n}]"
            _check(not message.function_call, f"{where}.function_call", _OLD)
            calls = _list(message.tool_calls, f"{where}.tool_calls")
            turns.append(
                _Turn(
                    where,
                    message.role,
                    message.content,
                    calls=tuple(_chat_call(call, f"{where}.tool_calls[{m}]") for m, call in enumerate(calls)),
                    answers=message.tool_call_id,
                )
            )
        constraints = _Constraints(
            _output_schema(self.response_format, "response_format", nested="json_schema"),
            *_tools(self.tools, self.tool_choice, nested="function"),
            parallel=self.parallel_tool_calls is not False,
        )
        return _conversation("messages", turns, constraints)


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

    def to_conversation(self) -> Conversation:
        """Raises Failure naming the invalid field."""
        _refuse(self, "previous_response_id conversation", "is not supported: send the whole conversation")
        _refuse(self, "prompt background top_logprobs", "is not supported")
        _check(self.text is None or isinstance(self.text, dict), "text", "must be an object")
        turns = [_Turn("instructions", "system", self.instructions, field="")]
        if isinstance(self.input, str):
            turns.append(_Turn("input", "user", self.input, field=""))
        else:
            _check(isinstance(self.input, list), "input", "must be text or a list of messages")
            _check(0 < len(self.input) <= MAX_MESSAGES, "input", f"must have 1 to {MAX_MESSAGES} items")
            for n, item in enumerate(self.input):
                _check(isinstance(item, dict), f"input[{n}]", "must be a message")
                if item.get("type") == "reasoning":
                    # The thoughts of another server's model: nothing that this agent could go on from.
                    continue
                turn = _item(item, f"input[{n}]")
                if turn.calls and turns[-1].role == "assistant":
                    # In this API, the calls of one turn and the text before them are separate items.
                    turns[-1] = replace(turns[-1], calls=(*turns[-1].calls, *turn.calls))
                else:
                    turns.append(turn)
        constraints = _Constraints(
            _output_schema(self._format(), "text.format"),
            *_tools(self.tools, self.tool_choice),
            parallel=self.parallel_tool_calls is not False,
        )
        return _conversation("input", turns, constraints)

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


class Call(msgspec.Struct, frozen=True):
    """The model's call of a client's function."""

    id: str
    name: str
    arguments: str


class Earlier(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message before the message to answer."""

    role: Literal["user", "assistant", "tool"]
    text: str
    calls: tuple[Call, ...] = ()
    """The calls of an assistant's message."""
    call: Call | None = None
    """The call that a tool's message answers."""
    images: tuple[str, ...] = ()
    """The addresses of a user's images, ``data:`` or ``https:``."""


class Tool(msgspec.Struct, frozen=True):
    name: str
    description: str
    parameters: dict[str, Any]
    """The JSON Schema of an object."""
    strict: bool = False


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of the agent's route for completions."""

    text: str
    """The message to answer."""
    history: list[Earlier]
    system: str | None
    """Added to the agent's own system prompt."""
    output_schema: dict[str, Any] | None = None
    tools: tuple[Tool, ...] = ()
    """The client's functions."""
    must_call: bool = False
    """True if the answer must be a call of a client's function."""
    parallel: bool = True
    """True if the answer may have several calls."""
    since: tuple[Earlier, ...] = ()
    """The calls and their results after the message to answer."""
    images: tuple[str, ...] = ()
    """Of the message to answer, as in `Earlier`."""


@dataclass(frozen=True)
class _Turn:
    """A message of the request."""

    where: str
    """The field of the message in the request."""
    role: Any
    content: Any
    field: str = ".content"
    """The name of the content's field."""
    calls: tuple[Call, ...] = ()
    answers: Any = None
    """The id of the call whose result this is."""
    answers_field: str = ".tool_call_id"
    """The name of the field `answers`."""


class _Constraints(NamedTuple):
    """The client's constraints on the answer; the fields of `Conversation`."""

    output_schema: dict[str, Any] | None
    tools: tuple[Tool, ...]
    must_call: bool
    parallel: bool


def _conversation(field: str, turns: Iterable[_Turn], constraints: _Constraints) -> Conversation:
    said: list[Earlier] = []
    system: list[str] = []
    # The calls of the last turn without a result yet, by id.
    open_: dict[str, Call] = {}
    for turn in turns:
        content, images = _text_and_images(turn.content, turn.where + turn.field, seen=turn.role == "user")
        _check(not open_ or turn.role not in ("user", "assistant"), turn.where, _unanswered(open_))
        match turn.role:
            case "system" | "developer":
                system += [content] if content else []
            case "user":
                _check(bool(content.strip() or images), turn.where + turn.field, "must not be empty")
                said.append(Earlier("user", content or NO_TEXT, images=images))
            case "assistant":
                open_ = {call.id: call for call in turn.calls}
                _check(len(open_) == len(turn.calls), turn.where, "has two calls of one id")
                # An empty message is an answer that was stopped before its first word.
                said += [Earlier("assistant", content, turn.calls)] if content or turn.calls else []
            case "tool":
                call = open_.pop(turn.answers, None) if isinstance(turn.answers, str) else None
                if call is None:
                    raise invalid_field(turn.where + turn.answers_field, "must be the id of a call just before")
                said.append(Earlier("tool", content, call=call))
            case "function":
                raise invalid_field(f"{turn.where}.role", _OLD)
            case _:
                raise invalid_field(f"{turn.where}.role", "must be system, developer, user, assistant or tool")
    _check(not open_, field, _unanswered(open_))
    _check(sum(len(turn.images) for turn in said) <= MAX_IMAGES, field, f"must have {MAX_IMAGES} images at most")
    asks = [n for n, turn in enumerate(said) if turn.role == "user"]
    _check(bool(asks) and said[-1].role != "assistant", field, "the last message must be of the user, or of a tool")
    last = asks[-1]
    return Conversation(
        said[last].text,
        said[:last],
        "\n\n".join(system) or None,
        **constraints._asdict(),
        since=tuple(said[last + 1 :]),
        images=said[last].images,
    )


def _unanswered(open_: Mapping[str, Call]) -> str:
    return f"the call {next(iter(open_), '')} before it has no result"


def _text_and_images(content: Any, where: str, *, seen: bool) -> tuple[str, tuple[str, ...]]:
    """`seen`: images may be among the parts."""
    images: tuple[str, ...] = ()
    if isinstance(content, list):
        parts = [(part, f"{where}[{n}]") for n, part in enumerate(content)]
        shown = [one for one in parts if seen and isinstance(one[0], dict) and one[0].get("type") in _IMAGES]
        images = tuple(_image(part, place) for part, place in shown)
        content = "\n".join(_part(part, place) for part, place in parts if (part, place) not in shown)
    _check(content is None or isinstance(content, str), where, "must be text or a list of parts")
    return _string(content or "", where), images


def _image(part: Mapping[str, Any], where: str) -> str:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    where = f"{where}.image_url"
    if not isinstance(url, str):
        raise invalid_field(where, "must be the address of an image")
    if url.startswith("data:"):
        data = _DATA_URL.fullmatch(url)
        # By the content: clients often name another type.
        is_image = data is not None and len(data[1]) % 4 == 0 and _type(data[1]) in _IMAGE_TYPES
        _check(is_image, where, "must be base64 of a png, jpeg, gif or webp image")
        _check(len(url) <= MAX_IMAGE_BYTES * 4 // 3, where, f"must have {MAX_IMAGE_BYTES // 1024**2} MB at most")
    else:
        _check(url.startswith("https://") and len(url) <= 2_000, where, "must begin with data: or https://")
    return url


def _type(data: str) -> str:
    try:
        return filetypes.content_type(io.BytesIO(base64.b64decode(data[:_HEAD])), "")
    except InvalidMessage:
        return filetypes.UNKNOWN  # the beginning of an archive


def _string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise invalid_field(where, "must be text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid_field(where, "must be valid Unicode text") from None
    _check(len(text) <= MAX_TEXT, where, f"must have {MAX_TEXT} characters at most")
    return text


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise invalid_field(f"{where}.type", "only text is supported")
    text = part.get(name)
    if not isinstance(text, str):
        raise invalid_field(f"{where}.{name}", "must be text")
    return text


def _tools(given: Any, choice: Any, *, nested: str = "") -> tuple[tuple[Tool, ...], bool]:
    """The functions to offer, and whether one of them must be called."""
    tools = _list(given, "tools")
    _check(len(tools) <= MAX_TOOLS, "tools", f"must be {MAX_TOOLS} at most")
    found: dict[str, Tool] = {}
    size = 0
    for n, each in enumerate(tools):
        function, where = _function(each, f"tools[{n}]", nested)
        _check_name(function.get("name"), f"{where}.name")
        _check(function["name"] not in found, f"{where}.name", "is there twice")
        strict = function.get("strict") or False
        _check(isinstance(strict, bool), f"{where}.strict", "must be true or false")
        parameters = _parameters(function.get("parameters"), f"{where}.parameters")
        if strict:
            parameters = _schema(parameters, f"{where}.parameters")
        description = _string(function.get("description") or "", f"{where}.description")
        tool = Tool(function["name"], description, parameters, strict)
        size += len(msgspec.json.encode(tool.parameters))
        _check(size <= MAX_PARAMETERS, "tools", f"must have {MAX_PARAMETERS} bytes of parameters at most")
        found[tool.name] = tool
    match choice:
        case None | "auto":
            return tuple(found.values()), False
        case "none":
            return (), False
        case "required":
            _check(bool(found), "tool_choice", "there are no tools")
            return tuple(found.values()), True
        case dict():
            function, where = _function(choice, "tool_choice", nested)
            chosen = [tool for tool in found.values() if tool.name == function.get("name")]
            _check(bool(chosen), f"{where}.name", "is none of the tools")
            # Only the chosen function is offered, so the model must call it.
            return tuple(chosen), True
    raise invalid_field("tool_choice", "must be none, auto, required or a function")


def _parameters(given: Any, where: str) -> dict[str, Any]:
    """The schema of a function's arguments. Clients write a function without parameters in many ways.

    Unless the function is strict, its schema goes to the model as it is: clients send older drafts of JSON Schema, and
    any keyword.
    """
    given = {} if given is None else given
    _check(isinstance(given, dict), where, "must be a JSON Schema of an object")
    parameters = {name: value for name, value in given.items() if value is not None}
    _check(parameters.setdefault("type", "object") == "object", f"{where}.type", "must be object")
    parameters.setdefault("properties", {})
    try:
        msgspec.json.encode(parameters)
    except RecursionError:
        raise invalid_field(where, "must not be nested so deeply") from None
    except UnicodeEncodeError:
        raise invalid_field(where, "must be valid Unicode text") from None
    return parameters


def _function(given: Any, where: str, nested: str) -> tuple[dict[str, Any], str]:
    """The fields of a function, and their place in the request."""
    _check(isinstance(given, dict), where, "must be an object")
    _check(given.get("type") == "function", f"{where}.type", "only function is supported")
    if not nested:
        return given, where
    fields = given.get(nested)
    if not isinstance(fields, dict):
        raise invalid_field(f"{where}.{nested}", "must be an object")
    return fields, f"{where}.{nested}"


def _item(item: Mapping[str, Any], where: str) -> _Turn:
    """An item of the input of a response."""
    match item.get("type", "message"):
        case "message":
            return _Turn(where, item.get("role"), item.get("content"))
        case "function_call":
            call = _call(item.get("call_id"), f"{where}.call_id", item, where)
            return _Turn(where, "assistant", None, calls=(call,))
        case "function_call_output":
            output, id_ = item.get("output"), item.get("call_id")
            return _Turn(where, "tool", output, field=".output", answers=id_, answers_field=".call_id")
    raise invalid_field(f"{where}.type", "only message, function_call and function_call_output are supported")


def _chat_call(given: Any, where: str) -> Call:
    function, inner = _function(given, where, "function")
    return _call(given.get("id"), f"{where}.id", function, inner)


def _call(id_: Any, where_id: str, function: Mapping[str, Any], where: str) -> Call:
    _check(bool(_string(id_, where_id)), where_id, "must not be empty")
    _check_name(function.get("name"), f"{where}.name")
    return Call(id_, function["name"], _string(function.get("arguments"), f"{where}.arguments"))


def _list(given: Any, where: str) -> list[Any]:
    _check(given is None or isinstance(given, list), where, "must be a list")
    return given or []


def _refuse(body: BaseModel, names: str, reason: str) -> None:
    for name in names.split():
        _check(not getattr(body, name), name, reason)


def _output_schema(format_: Any, where: str, *, nested: str = "") -> dict[str, Any] | None:
    """The schema that the format requires; None for any text. `nested` is the field that has the json_schema."""
    if format_ is None:
        return None
    _check(isinstance(format_, dict), where, "must be an object")
    match format_.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            given = format_
            if nested:
                given, where = format_.get(nested), f"{where}.{nested}"
                _check(isinstance(given, dict), where, "must be an object")
            _check_name(given.get("name"), f"{where}.name")
            return _schema(given.get("schema"), f"{where}.schema")
    raise invalid_field(f"{where}.type", "must be text, json_object or json_schema")


def _schema(schema: Any, where: str) -> dict[str, Any]:
    _check(isinstance(schema, dict), where, "must be a JSON Schema of an object")
    try:
        check_schema(where, schema)
    except InvalidMessage as error:
        raise invalid_field(error.field, error.reason) from None
    return dict(schema)


def _check_name(name: Any, where: str) -> None:
    _check(isinstance(name, str) and bool(_NAME.fullmatch(name)), where, f"must fit ^{_NAME.pattern}$")


def _check(holds: bool, field: str, reason: str) -> None:
    if not holds:
        raise invalid_field(field, reason)
