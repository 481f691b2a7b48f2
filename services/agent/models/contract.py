"""The request to a model and its answer, the same for all providers. Both are stored in the events of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Protocol

import msgspec

OnText = Callable[[str], Awaitable[None]]
"""Called with each further piece of the answer's text as it arrives."""

FAMILIES = ("openai", "anthropic", "google", "scripted")
"""The values of the part of a model's name before the slash."""


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call."""

    name: str
    description: str
    schema: dict[str, Any]
    """JSON Schema of the arguments, an object."""
    strict: bool = False
    """The arguments must match the schema."""


class Passage(msgspec.Struct, frozen=True):
    """A piece of the tenant's knowledge, with its source."""

    text: str
    score: float
    document_id: str
    name: str
    section: str | None = None
    page: int | None = None
    """Counts from 1."""

    @property
    def place(self) -> str:
        """The source as a person would write it: ``handbook.md, Returns, page 2``."""
        return ", ".join(filter(None, (self.name, self.section, f"page {self.page}" if self.page else None)))


class Extra(msgspec.Struct, frozen=True):
    """Fields of a tool call beside OpenAI's, such as Gemini's thought signatures. Its model may refuse a later request
    without them, and another model a request with them."""

    model: str
    """The model and the host of its server."""
    fields: dict[str, Any]


class ToolCall(msgspec.Struct, frozen=True, omit_defaults=True):
    """A call of a tool by the model."""

    id: str
    name: str
    arguments: str
    """The arguments as the model wrote them: a JSON object, unless the model made a mistake."""
    extra: Extra | None = None


class Image(msgspec.Struct, frozen=True):
    """An image that a person sent: stored, or as an address."""

    path: str = ""
    """In the object store; empty if there is an address."""
    content_type: str = ""
    url: str = ""
    """``data:…;base64,…`` or ``https://…``."""


class UserTurn(msgspec.Struct, frozen=True, tag="user", omit_defaults=True):
    """A message of a person, verbatim."""

    text: str
    images: tuple[Image, ...] = ()


class Reasoning(msgspec.Struct, frozen=True, omit_defaults=True):
    """Thoughts that came with tool calls. Some servers refuse a later request without them."""

    field: str
    """The field of the message in which the server sends them."""
    text: str
    model: str = ""
    """As in `Extra`. Empty in older events."""
    details: tuple[dict[str, Any], ...] = ()
    """The same in parts, also encrypted ones: ``reasoning_details`` of OpenRouter."""


class AssistantTurn(msgspec.Struct, frozen=True, tag="assistant"):
    """A message of the model, and the tool calls it asked for."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: Reasoning | None = None
    """Sent only to the same model, with the results of these calls."""


class ToolTurn(msgspec.Struct, frozen=True, tag="tool"):
    """The result of a tool call, or the reason why there is none."""

    call: ToolCall
    content: str


Turn = UserTurn | AssistantTurn | ToolTurn


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a caller of the API wants the answer to be written. None: as the model does by itself."""

    max_output_tokens: int | None = None
    """Of each model call of the run."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    reasoning_effort: str | None = None


class Prompt(msgspec.Struct, frozen=True):
    """One request to a model."""

    system: str
    turns: tuple[Turn, ...]
    """The conversation, oldest turn first. Its last `UserTurn` is the message to answer."""
    passages: tuple[Passage, ...] = ()
    tools: tuple[Tool, ...] = ()
    max_output_tokens: int | None = None
    """The limit of the answer; None: the provider's default."""
    output_schema: dict[str, Any] | None = None
    """JSON Schema that the answer must match, as JSON; None: any text."""
    must_call: bool = False
    """The model must call a tool."""
    parallel: bool = True
    """The model may call several tools at once."""
    sampling: Sampling = Sampling()


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the provider reports them. Cached tokens, read or written, are part of the input.

    None: not reported, which is different from zero.
    """

    input_tokens: int | None = None
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


class ModelAnswer(msgspec.Struct, frozen=True):
    """The answer of a model."""

    text: str
    calls: tuple[ToolCall, ...]
    usage: Usage
    model: str
    """The name of the model that answered, as the provider states it."""
    finish_reason: str
    """``stop``, ``tool_call``, ``refusal`` (the text is the refusal of the model), ``content_filter`` (cut off by
    the provider), or ``length`` (cut off by the limit of tokens or for an unknown reason)."""
    reasoning: Reasoning | None = None
    """Only of an answer with tool calls."""


class ModelEndpoint(msgspec.Struct, frozen=True):
    """The address of a model server and the key for it."""

    base_url: str | None = None
    """None: the provider's default."""
    api_key: str | None = None


class ModelFailed(Exception):
    """A model gave no answer. `reason` is for the operator; it contains no secret and no text of a person.

    transient: the failure is transient, so a retry may help, but not before `after` if the provider named a delay.
    usage: as the provider has reported it; None if it has not.
    """

    def __init__(
        self, reason: str, *, transient: bool, after: timedelta | None = None, usage: Usage | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.transient = transient
        self.after = after
        self.usage = usage if usage and usage.input_tokens is not None else None


class Model(Protocol):
    """A language model."""

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        """Raises ModelFailed."""
        ...
