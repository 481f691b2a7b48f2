"""Requests in OpenAI's shapes, and the conversation that they carry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from pydantic import BaseModel, Field

from infra.errors import InvalidMessage
from infra.json_schema import check_schema
from services.ws_gateway.openai.errors import unfit

MAX_MESSAGES = 1_000
MAX_TEXT = 100_000
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

# Parts of a content that are text, and where it is.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_NO_TOOLS = "an agent uses its own tools, not those of the client"


class _Message(BaseModel):
    role: str
    content: Any = None
    tool_calls: Any = None
    function_call: Any = None


class _StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of ``POST /v1/chat/completions``. What is not named here is ignored."""

    model: str = Field(description="An agent's id.")
    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, description="Only 1.")
    response_format: Any = None
    tools: Any = Field(default=None, description="None: an agent uses its own.")
    functions: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    modalities: Any = None
    audio: Any = None
    stop: Any = None
    web_search_options: Any = None

    def asked(self) -> Conversation:
        """Raises Failure naming the field that cannot be taken."""
        _refuse(self, "tools functions", _NO_TOOLS)
        _refuse(self, "logprobs top_logprobs audio stop web_search_options", "is not supported")
        _only(self.n in (None, 1), "n", "only 1 is supported")
        _only(self.modalities in (None, [], ["text"]), "modalities", "only text is supported")
        turns = []
        for n, message in enumerate(self.messages):
            where = f"messages[{n}]"
            for field in ("tool_calls", "function_call"):
                _only(not getattr(message, field), f"{where}.{field}", _NO_TOOLS)
            turns.append(_Turn(where, message.role, message.content))
        schema = _output_schema(self.response_format, "response_format", nested="json_schema")
        return _conversation("messages", turns, schema)


class ResponsesRequest(BaseModel):
    """The body of ``POST /v1/responses``. What is not named here is ignored."""

    model: str = Field(description="An agent's id.")
    input: Any = Field(description="Text, or a list of messages.")
    instructions: str | None = None
    stream: bool | None = None
    tools: Any = Field(default=None, description="None: an agent uses its own.")
    text: Any = None
    top_logprobs: Any = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None

    def asked(self) -> Conversation:
        """Raises Failure naming the field that cannot be taken."""
        _refuse(self, "tools", _NO_TOOLS)
        _refuse(self, "previous_response_id conversation", "is not supported: send the whole conversation")
        _refuse(self, "prompt background top_logprobs", "is not supported")
        _only(self.text is None or isinstance(self.text, dict), "text", "must be an object")
        turns = [_Turn("instructions", "system", self.instructions, field="")]
        if isinstance(self.input, str):
            turns.append(_Turn("input", "user", self.input, field=""))
        else:
            _only(isinstance(self.input, list), "input", "must be text or a list of messages")
            _only(0 < len(self.input) <= MAX_MESSAGES, "input", f"must have 1 to {MAX_MESSAGES} items")
            for n, item in enumerate(self.input):
                _only(isinstance(item, dict), f"input[{n}]", "must be a message")
                _only(item.get("type", "message") == "message", f"input[{n}].type", "only messages are supported")
                turns.append(_Turn(f"input[{n}]", item.get("role"), item.get("content")))
        return _conversation("input", turns, _output_schema(self._format(), "text.format"))

    def repeated(self) -> dict[str, Any]:
        """What the answer says again."""
        return {"instructions": self.instructions, "text": {"format": self._format() or {"type": "text"}}}

    def _format(self) -> Any:
        return (self.text or {}).get("format")


class Earlier(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant"]
    text: str


class Conversation(msgspec.Struct, frozen=True, omit_defaults=True):
    """As the agent takes it. text: what is to be answered. system: what the caller adds to the agent's own.
    output_schema: of what the answer has to be.
    """

    text: str
    history: list[Earlier]
    system: str | None
    output_schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Turn:
    """A message; `where` it is in the request, `field`: its content's name there."""

    where: str
    role: Any
    content: Any
    field: str = ".content"


def _conversation(field: str, turns: Iterable[_Turn], schema: dict[str, Any] | None) -> Conversation:
    said: list[Earlier] = []
    system: list[str] = []
    for turn in turns:
        content = _text(turn.content, turn.where + turn.field)
        match turn.role:
            case "system" | "developer":
                system += [content] if content else []
            case "user":
                _only(bool(content.strip()), turn.where + turn.field, "must not be empty")
                said.append(Earlier("user", content))
            case "assistant":
                # An empty one is an answer that was stopped before it began.
                said += [Earlier("assistant", content)] if content else []
            case "tool" | "function":
                raise unfit(f"{turn.where}.role", _NO_TOOLS)
            case _:
                raise unfit(f"{turn.where}.role", "must be system, developer, user or assistant")
    _only(bool(said) and said[-1].role == "user", field, "the last message must be of the user")
    return Conversation(said[-1].text, said[:-1], "\n\n".join(system) or None, schema)


def _text(content: Any, where: str) -> str:
    if isinstance(content, list):
        text = "\n".join(_part(part, f"{where}[{n}]") for n, part in enumerate(content))
    elif content is None or isinstance(content, str):
        text = content or ""
    else:
        raise unfit(where, "must be text or a list of parts")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise unfit(where, "is no Unicode text") from None
    _only(len(text) <= MAX_TEXT, where, f"must have {MAX_TEXT} characters at most")
    return text


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    name = _TEXTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise unfit(f"{where}.type", "only text is supported")
    text = part.get(name)
    if not isinstance(text, str):
        raise unfit(f"{where}.{name}", "must be text")
    return text


def _refuse(body: BaseModel, names: str, reason: str) -> None:
    for name in names.split():
        _only(not getattr(body, name), name, reason)


def _output_schema(format_: Any, where: str, *, nested: str = "") -> dict[str, Any] | None:
    """What the format asks for; None: any text. nested: the field in which a json_schema has its own fields."""
    if format_ is None:
        return None
    _only(isinstance(format_, dict), where, "must be an object")
    match format_.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "object"}
        case "json_schema":
            given = format_
            if nested:
                given, where = format_.get(nested), f"{where}.{nested}"
                _only(isinstance(given, dict), where, "must be an object")
            _check_name(given.get("name"), f"{where}.name")
            return _schema(given.get("schema"), f"{where}.schema")
    raise unfit(f"{where}.type", "must be text, json_object or json_schema")


def _schema(schema: Any, where: str) -> dict[str, Any]:
    _only(isinstance(schema, dict), where, "must be a JSON Schema of an object")
    try:
        check_schema(where, schema)
    except InvalidMessage as error:
        raise unfit(error.field, error.reason) from None
    return dict(schema)


def _check_name(name: Any, where: str) -> None:
    _only(isinstance(name, str) and bool(_NAME.fullmatch(name)), where, f"must fit ^{_NAME.pattern}$")


def _only(holds: bool, field: str, reason: str) -> None:
    if not holds:
        raise unfit(field, reason)
