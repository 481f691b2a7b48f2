"""OpenAI's chat completions, which most servers of models have: https://platform.openai.com/docs/api-reference/chat

One streaming request and its answer by hand. The provider's library takes several times as long for the same bytes
(decision 24).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Any
from uuid import uuid4

import httpx2
import msgspec

from infra import VERSION
from infra.errors import InvalidMessage, TooLarge
from infra.observe.redaction import redacted
from infra.outgoing.retry_after import delay, retry_after
from services.agent.models.contract import (
    AssistantTurn,
    Extra,
    ModelAnswer,
    ModelEndpoint,
    ModelFailed,
    OnText,
    Prompt,
    Reasoning,
    Tool,
    ToolCall,
    ToolTurn,
    Turn,
    Usage,
    UserTurn,
)
from services.agent.models.pieces import CALL_FIELDS, MAX_FIELDS, lines, whole_arguments
from services.agent.models.thoughts import without_thoughts
from services.agent.models.tool_schemas import tool_schema, with_own_root
from services.agent.models.wording import system_message, valid_arguments, wire_name
from services.agent.models.written_calls import BeforeCalls, taken

OPENAI = "https://api.openai.com/v1"
# Google's Gemini API in OpenAI's shape: https://ai.google.dev/gemini-api/docs/openai
GOOGLE = "https://generativelanguage.googleapis.com/v1beta/openai"

# After a minute without a byte the connection is considered dead.
TIMEOUT = httpx2.Timeout(60.0, connect=10.0)
# The limit for the first token: some servers send comments while they produce nothing.
FIRST_TOKEN_SECONDS = 120.0
TRANSIENT_STATUS = (408, 409, 425, 429)
# Groq refuses calls and JSON that the model has written badly. The next ones may be better.
_MISWRITTEN = (b"tool_use_failed", b"json_validate_failed")
# llama.cpp and Ollama answer 500 to a request that they can never take: with images, with tools, or too long.
_NEVER_TAKEN = re.compile(
    rb"image input|content.(part|type)|multimodal|mmproj|--jinja|context.(size|length|window)", re.IGNORECASE
)
# Gemini names the delay in the body and in no header. It is longer than all pauses of a run without it.
_DELAY = re.compile(
    rb'(?:retryDelay"\s*:\s*"|\b(?:retry|try again) (?:in|after) )([0-9]{1,9}(?:\.[0-9]{1,9})?) ?s', re.IGNORECASE
)
# The fields around the object that tells of an error.
_AROUND_ERRORS = ("error", "errors", "base_resp", "choices")
# Parts of the words in which servers say why an answer ended. The first row that has one counts, because some say it
# twice: Gemini's ``function_call_filter: MALFORMED_FUNCTION_CALL``.
_FINISHES = (
    (
        "interrupted",
        *("error", "abort", "cancel", "timeout", "malformed", "unexpected", "overload", "insufficient", "rate_limit"),
    ),
    (
        "content_filter",
        *("filter", "safety", "recitation", "prohibited", "blocklist", "blocked", "refus", "sensitive", "spii"),
        "guardrail",
    ),
    ("length", "length", "max", "limit", "window", "incomplete", "not_finished"),
    ("tool_call", "tool", "function"),
    ("stop", "stop", "eos", "end", "done", "complete", "finished", "success"),
)
# The fields in which servers send thoughts: https://api-docs.deepseek.com/guides/reasoning_model
_THOUGHTS = ("reasoning", "reasoning_content")
# The largest fields of a call beside OpenAI's that are stored, as JSON.
MAX_EXTRA_BYTES = 100_000
# A part of the thoughts comes in a piece for each token.
MAX_DETAILS = 100_000
# Of an answer with its thoughts and calls. It is copied several times before it is stored.
MAX_CHARACTERS = 8 * 1024**2
# Each call of a run has the same tools, and the change of 20 schemas takes milliseconds.
_KEPT_TOOLS = 500


class ChatModel:
    """One model of one server. `name` is our name of it, `own_name` the server's."""

    def __init__(
        self,
        name: str,
        own_name: str,
        endpoint: ModelEndpoint,
        transport: httpx2.AsyncBaseTransport,
    ) -> None:
        self._name = name
        self._own_name = own_name
        base = httpx2.URL(endpoint.base_url or (GOOGLE if name.startswith("google/") else OPENAI))
        self._url = base.copy_with(path=f"{base.path.rstrip('/')}/chat/completions")
        self._headers = {
            "authorization": f"Bearer {endpoint.api_key or 'none'}",
            "content-type": "application/json",
            "accept": "application/json",
            "accept-encoding": "gzip, deflate",
            "user-agent": f"clawbus/{VERSION}",
        }
        # Models of OpenAI refuse the older name. Many other servers know only that one, and ignore the newer one.
        is_openai = base.host.endswith(("api.openai.com", ".azure.com"))
        self._limit = "max_completion_tokens" if is_openai else "max_tokens"
        self._sender = f"{name} {base.host}"
        self._transport = transport

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        """Sends one streaming request. Raises ModelFailed."""
        names = {wire_name(tool.name): tool.name for tool in prompt.tools}
        request = httpx2.Request(
            "POST",
            self._url,
            headers=self._headers,
            content=msgspec.json.encode(self._body(prompt)),
            extensions={"timeout": TIMEOUT.as_dict()},
        )
        received, shown = _Received(), 0
        tools = {name: tool for tool in prompt.tools for name in (tool.name, wire_name(tool.name))}
        # An answer that has to be JSON may look like a call.
        bare = prompt.output_schema is None
        before_calls = BeforeCalls(tools, bare=bare)
        try:
            async with asyncio.timeout(FIRST_TOKEN_SECONDS) as waiting:
                response = await self._transport.handle_async_request(request)
                try:
                    if response.status_code != 200:
                        raise self._refused(response, await response.aread())
                    async for chunk in self._chunks(response):
                        with self._reading():
                            text = received.take(chunk)
                        if received.has_begun:
                            waiting.reschedule(None)
                        if text := before_calls.feed(text):
                            shown += len(text)
                            await on_text(text)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            reason = f"{self._name}: no answer began within {FIRST_TOKEN_SECONDS:g} seconds"
            raise ModelFailed(reason, transient=True) from error
        except (InvalidMessage, TooLarge) as error:
            raise ModelFailed(f"{self._name}: {error}", transient=False) from error
        except httpx2.HTTPError as error:
            raise ModelFailed(f"{self._name}: {type(error).__name__}", transient=True) from error
        with self._reading():
            received.read_written_calls(tools, bare=bare)
            received.read_refusal()
            answer = self._answer(received, names)
        if rest := "".join(received.text)[shown:]:
            await on_text(rest)
        return answer

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._own_name,
            "messages": _messages(prompt, self._sender),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if prompt.max_output_tokens is not None:
            body[self._limit] = prompt.max_output_tokens
        sampling = msgspec.to_builtins(prompt.sampling)
        body |= {name: value for name, value in sampling.items() if name != "max_output_tokens"}
        if prompt.tools:
            # Without tools the options for tools are absent, because some servers refuse them.
            body["tools"] = [msgspec.Raw(_tool(msgspec.json.encode(tool))) for tool in prompt.tools]
            body["tool_choice"] = "required" if prompt.must_call else "auto"
            if not prompt.parallel:
                body["parallel_tool_calls"] = False
        if prompt.output_schema is not None:
            schema = with_own_root(prompt.output_schema)
            # Not every schema can be strict: OpenAI would refuse it, or an object with free fields would have to be
            # closed.
            probe = _transformer(schema, strict=None)
            probe.walk()
            strict = bool(probe.is_strict_compatible)
            form = {"name": "answer", "schema": _transformer(schema, strict=strict).walk(), "strict": strict}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Any value may stand in any place of an answer: the server is a tenant's."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise ModelFailed(f"{self._name}: the answer is malformed", transient=True) from error

    async def _chunks(self, response: httpx2.Response) -> AsyncIterator[Mapping[str, Any]]:
        """The chunks of the stream. Reads it to its end, so that the connection can be used again."""
        with self._reading():
            async for line in lines(response.aiter_bytes()):
                data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
                if data and data != b"[DONE]":
                    yield self._chunk(data)

    def _chunk(self, data: bytes) -> Mapping[str, Any]:
        try:
            chunk = msgspec.json.decode(data)
        except msgspec.DecodeError as error:
            raise ModelFailed(f"{self._name}: the answer is malformed", transient=True) from error
        if isinstance(chunk, dict) and chunk.get("error"):
            told = _error(chunk)
            status = _status(told)
            reason = f"{self._name}: the server failed during the answer{_detail(status, told)}"
            raise ModelFailed(reason, transient=status is None or _is_transient(status, data), after=_delay(data))
        if not isinstance(chunk, dict) or not isinstance(chunk.get("choices"), list | None):
            raise ModelFailed(f"{self._name}: the answer is malformed", transient=True)
        return chunk

    def _refused(self, response: httpx2.Response, body: bytes) -> ModelFailed:
        status = response.status_code
        try:
            error = _error(msgspec.json.decode(body))
        except (msgspec.DecodeError, RecursionError):
            error = {}
        reason = f"{self._name}: HTTP {status}{_detail(status, error)}"
        after = retry_after(response.headers) or _delay(body)
        return ModelFailed(reason, transient=_is_transient(status, body), after=after)

    def _answer(self, received: _Received, names: Mapping[str, str]) -> ModelAnswer:
        text, calls = "".join(received.text), tuple(received.calls.values())
        if received.finish is None:
            # A proxy cut the stream and then closed the connection normally.
            raise ModelFailed(f"{self._name}: the answer was cut off", transient=True)
        finish, usage = finish_reason(received.finish), _usage(received.usage)
        if finish == "interrupted":
            raise ModelFailed(f"{self._name}: the server failed during the answer", transient=True, usage=usage)
        if not all(call["name"] for call in calls):
            # An earlier call without a name would make each later request invalid.
            reason = f"{self._name}: the answer has a tool call without a name"
            raise ModelFailed(reason, transient=True, usage=usage)
        if finish == "content_filter" and not text and not calls:
            reason = f"{self._name}: the provider's content filter withheld the answer"
            raise ModelFailed(reason, transient=False, usage=usage)
        reasoning = None
        if calls and (received.thoughts or received.details):
            field, pieces = next(iter(received.thoughts.items()), (_THOUGHTS[0], []))
            details = tuple(map(_joined, received.details.values()))
            reasoning = Reasoning(field, "".join(pieces), self._sender, details)
        return ModelAnswer(
            text=without_thoughts(text),
            calls=tuple(
                ToolCall(
                    call["id"],
                    # Models that were trained on namespaces write ``functions.name``.
                    names.get(call["name"], names.get(call["name"].removeprefix("functions."), call["name"])),
                    whole_arguments(call["arguments"]) or "{}",
                    self._extra(call["extra"]),
                )
                for call in calls
            ),
            reasoning=reasoning,
            usage=usage,
            model=received.model or self._name,
            finish_reason="refusal" if received.is_refusal else finish,
        )

    def _extra(self, fields: dict[str, Any]) -> Extra | None:
        too_large = len(msgspec.json.encode(fields)) > MAX_EXTRA_BYTES
        return Extra(self._sender, fields) if fields and not too_large else None


class _Received:
    """The part of an answer that has come."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.calls: dict[int, dict[str, Any]] = {}
        """By index."""
        self.thoughts: dict[str, list[str]] = {}
        """By field."""
        self.details: dict[str, list[dict[str, Any]]] = {}
        """The pieces of each part of the thoughts."""
        self._pieces = 0
        """How many pieces `details` has."""
        self._size = 0
        self.usage: Mapping[str, Any] | None = None
        self.model = ""
        self.finish: str | None = None
        self.refusal: list[str] = []
        self.is_refusal = False
        """The text is the refusal."""

    @property
    def has_begun(self) -> bool:
        return bool(self.text or self.calls or self.thoughts or self.details or self.refusal)

    def take(self, chunk: Mapping[str, Any]) -> str:
        """Adds a chunk, as `Completions` has repaired it. Returns its text. Raises TooLarge: pieces take twenty times
        their bytes in memory."""
        self.model = self.model or (model if isinstance(model := chunk.get("model"), str) else "")
        self.usage = chunk.get("usage") or self.usage
        said = ""
        for choice in (chunk.get("choices") or ())[:1]:
            delta = choice["delta"]
            if content := delta["content"]:
                self._count(content)
                self.text.append(content)
                said += content
            for field in _THOUGHTS:
                if isinstance(thought := delta.get(field), str) and thought:
                    self._count(thought)
                    self.thoughts.setdefault(field, []).append(thought)
                    break
            details = delta.get("reasoning_details")
            for detail in details if isinstance(details, list) else ():
                if isinstance(detail, dict):
                    self._count(*(value for value in detail.values() if isinstance(value, str)))
                    self._pieces += 1
                    if self._pieces > MAX_DETAILS:
                        raise TooLarge(f"the thoughts have more than {MAX_DETAILS} pieces")
                    # A text comes in pieces of one index, with its signature in the last one.
                    is_text = detail.get("type") in ("reasoning.text", "reasoning.summary")
                    place = (detail["type"], detail.get("index")) if is_text else len(self.details)
                    self.details.setdefault(str(place), []).append(detail)
            for piece in delta.get("tool_calls") or ():
                self._take_call(piece)
            if finish := choice.get("finish_reason"):
                self.finish = str(finish)
            if isinstance(refusal := delta.get("refusal"), str) and refusal:
                self._count(refusal)
                self.refusal.append(refusal)
        return said

    def _count(self, *texts: str) -> None:
        self._size += sum(map(len, texts))
        if self._size > MAX_CHARACTERS:
            raise TooLarge(f"the answer has more than {MAX_CHARACTERS} characters")

    def read_written_calls(self, tools: Mapping[str, Tool], *, bare: bool) -> None:
        """Moves calls from the end of the text to the calls; as `taken`."""
        text, found = taken("".join(self.text), tools, bare=bare)
        self.text = [text]
        # Some servers send the calls in both forms.
        for n, call in enumerate(() if self.calls else found):
            arguments = msgspec.json.encode(call.arguments).decode()
            self.calls[n] = {"id": f"call_{uuid4().hex[:12]}", "name": call.name, "arguments": [arguments], "extra": {}}

    def read_refusal(self) -> None:
        """Takes the refusal for the text of an answer without another. OpenAI sends it apart if a schema is given."""
        if "".join(self.refusal).strip() and not self.calls and not "".join(self.text).strip():
            self.text, self.is_refusal = self.refusal, True

    def _take_call(self, piece: Mapping[str, Any]) -> None:
        call = self.calls.setdefault(piece["index"], {"id": "", "name": "", "arguments": [], "extra": {}})
        function = piece["function"]
        call["id"] = piece.get("id") or call["id"]
        call["name"] = function.get("name") or call["name"]
        arguments = function.get("arguments") or ""
        self._count(arguments)
        call["arguments"].append(arguments)
        call["extra"] |= {name: value for name, value in piece.items() if name not in CALL_FIELDS and value is not None}
        if len(call["extra"]) > MAX_FIELDS:
            raise TooLarge(f"a tool call has more than {MAX_FIELDS} fields")


def _joined(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A part of the thoughts from its pieces: https://openrouter.ai/docs/guides/best-practices/reasoning-tokens"""
    whole = {name: value for piece in pieces for name, value in piece.items() if value is not None}
    for name in ("text", "summary"):
        if name in whole:
            whole[name] = "".join(piece[name] for piece in pieces if isinstance(piece.get(name), str))
    return whole


def finish_reason(word: str) -> str:
    """The `ModelAnswer.finish_reason` for a server's word, or ``interrupted``: the answer did not come to its end.

    An unknown word tells of no regular end (Gemini's ``OTHER``, vLLM's ``repetition``), so the answer counts as cut.
    """
    word = word.lower()
    return next((reason for reason, *parts in _FINISHES if any(part in word for part in parts)), "length")


@lru_cache(_KEPT_TOOLS)
def _tool(encoded: bytes) -> bytes:
    """The tool as JSON, for the request."""
    from pydantic_ai.exceptions import UserError

    tool = msgspec.json.decode(encoded, type=Tool)
    parameters = tool_schema(tool.schema)
    with suppress(UserError):  # malformed, by a client of /v1: the server judges it
        parameters = _transformer(parameters, strict=tool.strict).walk()
    function = {"name": wire_name(tool.name), "description": tool.description, "parameters": parameters} | (
        {"strict": True} if tool.strict else {}
    )  # not every server knows it
    return msgspec.json.encode({"type": "function", "function": function})


def _transformer(schema: dict[str, Any], *, strict: bool | None) -> Any:
    """Its `walk` brings a JSON Schema into the form that OpenAI takes. `strict`: None to find out if it can be."""
    # Imported here: a plain answer needs no schema, and the library takes long to import.
    from pydantic_ai.profiles.openai import OpenAIJsonSchemaTransformer

    return OpenAIJsonSchemaTransformer(schema, strict=strict)


def _messages(prompt: Prompt, model: str) -> list[dict[str, Any]]:
    """`model`: as in `Extra`."""
    messages: list[dict[str, Any]] = []
    if system := system_message(prompt):
        messages.append({"role": "system", "content": system})
    messages += filter(None, (_message(turn, model) for turn in prompt.turns))
    return messages


def _message(turn: Turn, model: str) -> dict[str, Any] | None:
    match turn:
        case UserTurn(text, images) if images:
            parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
            parts += [{"type": "image_url", "image_url": {"url": image.url}} for image in images]
            return {"role": "user", "content": parts}
        case UserTurn(text):
            return {"role": "user", "content": text}
        case AssistantTurn(text, calls, reasoning):
            if not text and not calls:
                return None
            message: dict[str, Any] = {"role": "assistant", "content": text or None}
            if reasoning and reasoning.model in ("", model):
                message |= {reasoning.field: reasoning.text} if reasoning.text else {}
                message |= {"reasoning_details": reasoning.details} if reasoning.details else {}
            if calls:
                message["tool_calls"] = [_call(call, model) for call in calls]
            return message
        case ToolTurn(call, content):
            return {"role": "tool", "tool_call_id": call.id, "content": content}


def _call(call: ToolCall, model: str) -> dict[str, Any]:
    function = {"name": wire_name(call.name), "arguments": valid_arguments(call.arguments)}
    extra = call.extra.fields if call.extra and call.extra.model == model else {}
    return {**extra, "id": call.id, "type": "function", "function": function}


def _usage(given: Mapping[str, Any] | None) -> Usage:
    """`given`: as `completions.usage` returns it."""
    if given is None:
        return Usage()
    return Usage(
        input_tokens=given["prompt_tokens"],
        cached_tokens=given.get("prompt_tokens_details", {}).get("cached_tokens"),
        output_tokens=given["completion_tokens"],
        reasoning_tokens=given.get("completion_tokens_details", {}).get("reasoning_tokens"),
    )


def _error(given: Any) -> Mapping[str, Any]:
    """The object that tells of an error. Servers put it into others, and into lists; some send only its text."""
    while True:
        if isinstance(given, dict):
            inner = next((given[name] for name in _AROUND_ERRORS if given.get(name)), None)
            if inner is None and isinstance(given.get("message"), dict):
                inner = given["message"]  # Mistral
            if inner is None:
                return given
            given = inner
        elif isinstance(given, list):
            given = given[0] if given else None
        else:
            return {"message": given}


def _status(error: Mapping[str, Any]) -> int | None:
    """The HTTP status of an error in a stream, which servers put into several fields; None if it has none."""
    for name in ("status_code", "code", "status"):
        with suppress(TypeError, ValueError, OverflowError):
            if 400 <= (status := int(error.get(name) or 0)) < 600:
                return status
    return None


def _delay(body: bytes) -> timedelta | None:
    """The delay that an error names in its words."""
    named = _DELAY.search(body)
    return delay(float(named[1])) if named else None


def _is_transient(status: int, body: bytes) -> bool:
    if status == 429 and (b"insufficient_quota" in body or b"PerDay" in body):
        return False  # it does not pass by itself in the time of a run
    if status == 500 and _NEVER_TAKEN.search(body):
        return False
    return status >= 500 or status in TRANSIENT_STATUS or any(code in body for code in _MISWRITTEN)


def _detail(status: int | None, error: Mapping[str, Any]) -> str:
    """The provider's message, except if it is about the key: some providers repeat parts of it."""
    if status in (401, 403):
        return " (is the provider's api_key right?)"
    metadata = error.get("metadata")
    # OpenRouter has the words of its provider beside its own.
    told = [error.get(name) for name in ("message", "detail", "msg", "status_msg")]
    told += [metadata.get("raw")] if isinstance(metadata, dict) else []
    message = ": ".join(filter(None, map(_words, told)))
    return f": {redacted(message)[:300]}" if message else ""


def _words(told: object) -> str:
    """A text, or the fields that FastAPI refuses. Their values are left out: they may be a person's text."""
    if isinstance(told, list):
        fields = [(one.get("loc"), one.get("msg")) for one in told if isinstance(one, dict)]
        return "; ".join(f"{'.'.join(map(str, loc))}: {msg}" for loc, msg in fields if isinstance(loc, list))
    return told if isinstance(told, str) else ""
