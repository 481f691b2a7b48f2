"""What a model is asked and what it answers, the same for all providers. Pure, and stored in the journal of a run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Protocol

import msgspec

OnText = Callable[[str], Awaitable[None]]
"""Is given each further piece of the answer's text as it arrives."""

FAMILIES = ("openai", "anthropic", "google", "scripted")
"""What the part of a model's name before the slash may be."""


class Tool(msgspec.Struct, frozen=True):
    """A tool that the model may call. `schema`: JSON Schema of its arguments, an object. strict: they have to fit."""

    name: str
    description: str
    schema: dict[str, Any]
    strict: bool = False


class Passage(msgspec.Struct, frozen=True):
    """A piece of the tenant's knowledge, and where it is from. `page` counts from 1."""

    text: str
    score: float
    document_id: str
    name: str
    section: str | None = None
    page: int | None = None

    @property
    def place(self) -> str:
        """The source as a person would write it: ``handbook.md, Returns, page 2``."""
        return ", ".join(filter(None, (self.name, self.section, f"page {self.page}" if self.page else None)))


class ToolCall(msgspec.Struct, frozen=True):
    """`arguments`: as the model wrote them; a JSON object, if it did well."""

    id: str
    name: str
    arguments: str


class Said(msgspec.Struct, frozen=True, tag="user"):
    """A person's words, verbatim."""

    text: str


class Answered(msgspec.Struct, frozen=True, tag="assistant"):
    """The model's words, and the tools it asked for."""

    text: str
    calls: tuple[ToolCall, ...] = ()


class Returned(msgspec.Struct, frozen=True, tag="tool"):
    """What a tool gave back, or why it gave nothing."""

    call: ToolCall
    content: str


Turn = Said | Answered | Returned


class Prompt(msgspec.Struct, frozen=True):
    """One request. `turns`: the conversation, oldest first; its last `Said` is what is to be answered.

    max_output_tokens: the most that the answer may have; None: as the provider sees fit. output_schema: JSON Schema of
    what the answer has to be, as JSON; None: any text. must_call: a tool has to be called; parallel: several at once
    may be.
    """

    system: str
    turns: tuple[Turn, ...]
    passages: tuple[Passage, ...] = ()
    tools: tuple[Tool, ...] = ()
    max_output_tokens: int | None = None
    output_schema: dict[str, Any] | None = None
    must_call: bool = False
    parallel: bool = True


class Usage(msgspec.Struct, frozen=True):
    """Tokens as the provider reports them: cached ones, read or written, are part of the input.

    None: not reported, which is not zero.
    """

    input_tokens: int | None = None
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


class Answer(msgspec.Struct, frozen=True):
    """`model`: the one that answered, by the provider's own word."""

    text: str
    calls: tuple[ToolCall, ...]
    usage: Usage
    model: str
    finish_reason: str


class Endpoint(msgspec.Struct, frozen=True):
    """Where a model is asked. base_url: None is the provider's own."""

    base_url: str | None = None
    api_key: str | None = None


class ModelFailed(Exception):
    """A model gave no answer. `reason` is for the operator: no secret, nothing that a person wrote.

    passing: asking again may help, no sooner than `after`, if the provider named a time.
    """

    def __init__(self, reason: str, *, passing: bool, after: timedelta | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.passing = passing
        self.after = after


class Model(Protocol):
    """A language model."""

    async def answer(self, prompt: Prompt, on_text: OnText) -> Answer:
        """Raises ModelFailed."""
        ...
