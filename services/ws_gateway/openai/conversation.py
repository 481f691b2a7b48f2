"""The conversation that a request becomes: the body of the agent's route for completions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import msgspec

from services.ws_gateway.openai.content import text_and_images
from services.ws_gateway.openai.errors import invalid_field
from services.ws_gateway.openai.fields import check

MAX_IMAGES = 20
# The text of a message that has only images.
NO_TEXT = "[image]"


class FunctionCall(msgspec.Struct, frozen=True):
    """The model's call of a client's function."""

    id: str
    name: str
    arguments: str


class Earlier(msgspec.Struct, frozen=True, omit_defaults=True):
    """A message before the message to answer."""

    role: Literal["user", "assistant", "tool"]
    text: str
    calls: tuple[FunctionCall, ...] = ()
    """The calls of an assistant's message."""
    call: FunctionCall | None = None
    """The call that a tool's message answers."""
    images: tuple[str, ...] = ()
    """The addresses of a user's images, ``data:`` or ``https:``."""


class ClientFunction(msgspec.Struct, frozen=True):
    name: str
    description: str
    parameters: dict[str, Any]
    """The JSON Schema of an object."""
    strict: bool = False


class CompletionRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of the agent's route for completions."""

    text: str
    """The message to answer."""
    history: list[Earlier]
    system: str | None
    """Added to the agent's own system prompt."""
    output_schema: dict[str, Any] | None = None
    tools: tuple[ClientFunction, ...] = ()
    """The client's functions."""
    must_call: bool = False
    """True if the answer must be a call of a client's function."""
    parallel: bool = True
    """True if the answer may have several calls."""
    since: tuple[Earlier, ...] = ()
    """The calls and their results after the message to answer."""
    images: tuple[str, ...] = ()
    """Of the message to answer, as in `Earlier`."""
    sampling: dict[str, Any] = {}
    """How the model is to write: the fields of the agent's `Sampling`."""


@dataclass(frozen=True)
class Turn:
    """A message of the request."""

    where: str
    """The field of the message in the request."""
    role: Any
    content: Any
    field: str = ".content"
    """The name of the content's field."""
    calls: tuple[FunctionCall, ...] = ()
    answers: Any = None
    """The id of the call whose result this is."""
    answers_field: str = ".tool_call_id"
    """The name of the field `answers`."""


class Constraints(NamedTuple):
    """The client's constraints on the answer; the fields of `CompletionRequest`."""

    output_schema: dict[str, Any] | None
    tools: tuple[ClientFunction, ...]
    must_call: bool
    parallel: bool
    sampling: dict[str, Any]


def conversation(field: str, turns: Iterable[Turn], constraints: Constraints) -> CompletionRequest:
    said: list[Earlier] = []
    system: list[str] = []
    # The calls of the last turn without a result yet, by id.
    open_: dict[str, FunctionCall] = {}
    # The field of the last user's message, if it is empty.
    empty = ""
    for turn in turns:
        content, images = text_and_images(turn.content, turn.where + turn.field, turn.role)
        check(not open_ or turn.role not in ("user", "assistant"), turn.where, _unanswered(open_))
        match turn.role:
            case "system" | "developer":
                system += [content] if content else []
            case "user":
                # Clients keep empty messages in their history. Only the last one must have something to answer.
                is_empty = not content.strip() and not images
                empty = turn.where + turn.field if is_empty else ""
                said += [] if is_empty else [Earlier("user", content or NO_TEXT, images=images)]
            case "assistant":
                open_ = {call.id: call for call in turn.calls}
                check(len(open_) == len(turn.calls), turn.where, "has two calls of one id")
                # An empty message is an answer that was stopped before its first word.
                said += [Earlier("assistant", content, turn.calls)] if content or turn.calls else []
            case "tool":
                call = open_.pop(turn.answers, None) if isinstance(turn.answers, str) else None
                if call is None:
                    raise invalid_field(turn.where + turn.answers_field, "must be that of a call just before")
                said.append(Earlier("tool", content, call=call))
            case _:
                raise invalid_field(f"{turn.where}.role", "must be system, developer, user, assistant or tool")
    check(not open_, field, _unanswered(open_))
    check(sum(len(turn.images) for turn in said) <= MAX_IMAGES, field, f"must have {MAX_IMAGES} images at most")
    check(not empty, empty, "must not be empty")
    if not said and system and system[-1].strip():
        # A prompt alone, as workflow tools send it: the model answers it.
        said.append(Earlier("user", system.pop()))
    asks = [n for n, turn in enumerate(said) if turn.role == "user"]
    check(bool(asks) and said[-1].role != "assistant", field, "the last message must be of the user, or of a tool")
    last = asks[-1]
    return CompletionRequest(
        said[last].text,
        said[:last],
        "\n\n".join(system) or None,
        **constraints._asdict(),
        since=tuple(said[last + 1 :]),
        images=said[last].images,
    )


def _unanswered(open_: Mapping[str, FunctionCall]) -> str:
    return f"the call {next(iter(open_), '')} before it has no result"
