"""Repairs the traffic with OpenAI-shaped servers, so that the client library reads the format of OpenAI itself.

Many servers have the shape and not the details: they answer in one piece, repeat running totals of the usage, omit the
finish reason, give two calls one index or id, cut characters in two, send thoughts as text, or refuse an option. A
stream that is well formed passes through with the same content.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import httpx2
import msgspec

from infra.errors import TooLarge
from infra.recent import Recent
from services.agent.models import refusals
from services.agent.models.pieces import MAX_FIELDS, Chunk, ToolCalls, as_events, check_size, lines
from services.agent.models.thoughts import HELD, Thoughts

# At most this many options are left out one after the other.
_MOST_OPTIONS = 8
# So many endpoints and models. A forgotten one costs a request more.
_REMEMBERED = 4_096
# Servers of the providers themselves send thoughts in a field of their own.
_OWN_SERVERS = ("api.openai.com", "generativelanguage.googleapis.com")
# How long the rest of a stream is awaited after its end. Some servers leave the connection open.
REST_SECONDS = 1.0
# The fields of a delta that a server may cut inside a character.
_TEXTS = ("content", "reasoning_content", "reasoning")
# In Anthropic's names, the input that is beside ``input_tokens``.
_BESIDE_INPUT = ("cache_read_input_tokens", "cache_creation_input_tokens")
# How servers write that the answer goes on.
_NO_FINISHES = (None, "", "null", "None")
# The types of a content's parts that have text for the person.
_PARTS = (None, "text", "output_text")
# An answer has fewer tokens. Larger numbers are errors, and would be charged.
_MOST_TOKENS = 100_000_000


class Completions(httpx2.AsyncBaseTransport):
    """A transport that repairs chat completions. Other requests pass through."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner
        self._refused: Recent[object, set[str]] = Recent(_REMEMBERED)
        """The parts of a request that each endpoint refused for each model."""
        self._thinks_aloud: Recent[object, None] = Recent(_REMEMBERED)
        """The endpoints and models whose thoughts end with a tag but do not begin with one."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if not request.url.path.endswith("/chat/completions"):
            return await self._inner.handle_async_request(request)
        body: dict[str, Any] = msgspec.json.decode(await request.aread())
        endpoint = str(request.url), request.headers.get("authorization"), body.get("model")
        refused, lasting = set(self._refused.get(endpoint, ())), set[str]()
        response = await self._inner.handle_async_request(_again(request, body, refused) if refused else request)
        for _ in range(_MOST_OPTIONS):
            if response.status_code not in (400, 413, 422, 429, 500):
                break
            answer = await response.aread()
            await response.aclose()
            refusal = refusals.found(response.status_code, answer, body, refused)
            if refusal is None:
                return _copy(response, answer, request)
            refused |= refusal.parts
            lasting |= refusal.parts if refusal.lasts else set()
            body |= refusal.values
            response = await self._inner.handle_async_request(_again(request, body, refused))
        if response.status_code != 200:
            return response
        if lasting:
            # Only after success: an error may name an option without being about it.
            self._refused.setdefault(endpoint, set()).update(lasting)
        model = endpoint[0], body.get("model")
        held = 0 if request.url.host in _OWN_SERVERS else HELD
        repair = _Repair(Thoughts(None if model in self._thinks_aloud else held))
        try:
            stream = await as_events(response.aiter_bytes(), _events)
        except BaseException:
            await response.aclose()
            raise

        def remember() -> None:
            if repair.thoughts.ended_without_beginning:
                self._thinks_aloud[model] = None

        headers = {name: response.headers[name] for name in ("x-request-id",) if name in response.headers}
        return httpx2.Response(
            200,
            headers={"content-type": "text/event-stream", **headers},
            stream=_Repaired(repair.lines(stream), response, remember),
            request=request,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Repaired(httpx2.AsyncByteStream):
    def __init__(self, events: AsyncIterator[bytes], response: httpx2.Response, ended: Callable[[], None]) -> None:
        self._events = events
        self._response = response
        self._ended = ended

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for event in self._events:
            yield event

    async def aclose(self) -> None:
        self._ended()
        await self._response.aclose()


def _again(request: httpx2.Request, body: Mapping[str, Any], refused: set[str]) -> httpx2.Request:
    """The request with this body, without the refused parts."""
    headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
    return httpx2.Request(
        request.method,
        request.url,
        headers=headers,
        content=msgspec.json.encode(refusals.without(body, refused)),
        extensions=request.extensions,
    )


def _copy(response: httpx2.Response, content: bytes, request: httpx2.Request) -> httpx2.Response:
    kept = [(n, v) for n, v in response.headers.items() if n not in ("content-length", "content-encoding")]
    return httpx2.Response(response.status_code, headers=kept, content=content, request=request)


def _events(body: bytes) -> bytes:
    """A ``chat.completion`` as ``chat.completion.chunk`` events. Any other body becomes one event, unchanged."""
    try:
        completion: dict[str, Any] = msgspec.json.decode(body)
        choices = [_delta(choice) for choice in completion["choices"]]
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError, RecursionError):
        return b"data: " + body.replace(b"\n", b" ") + b"\n\n"
    chunk = completion | {"object": "chat.completion.chunk", "choices": choices}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = [{"index": n} | call for n, call in enumerate(message.get("tool_calls") or ())]
    return {
        "index": choice.get("index", 0),
        "delta": message | ({"tool_calls": calls} if calls else {}),
        # The answer is complete, even if it has no finish reason.
        "finish_reason": choice.get("finish_reason") or "stop",
    }


class _Repair:
    """Repairs one stream of chunks."""

    def __init__(self, thoughts: Thoughts) -> None:
        self.thoughts = thoughts
        self._calls = ToolCalls()
        self._usage: Chunk | None = None
        self._reported: Chunk = {}
        """All fields of the usage so far: some servers report input and output in different chunks."""
        self._lines: list[bytes] = []
        """The lines so far of an event of several lines."""
        self._size = 0
        """Their bytes."""
        self._is_error = False
        """The event that is read is named an error."""
        self._halves: dict[str, str] = {}
        """By field, the first half of a character whose second half comes with the next text."""
        self._choice: Any = None
        """The index of the choice that is read. Only one is asked for."""
        self._base: Chunk = {}
        self._finish: str | None = None
        self._is_complete = False
        self._has_content = False

    async def lines(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        found = lines(stream)
        async for line in found:
            for event in self._line(line):
                yield event
            if self._is_complete:
                break
        if self._is_complete:
            await self._read_rest(found)
        # Nothing ends the last event.
        for event in self._line(b""):
            yield event
        if self._is_error:
            yield _event({"error": "event"})
        if self._finish is not None or self._is_complete:
            for chunk in self._end():
                yield _event(chunk)

    async def _read_rest(self, found: AsyncIterator[bytes]) -> None:
        """Reads on after the end: some servers report the usage there. The answer is complete, so nothing fails it."""
        with suppress(TimeoutError, httpx2.HTTPError, TooLarge):
            async with asyncio.timeout(REST_SECONDS):
                async for line in found:
                    for _ in self._line(line):
                        pass

    def _line(self, line: bytes) -> Iterator[bytes]:
        # A stream may begin with a byte order mark: https://html.spec.whatwg.org/multipage/server-sent-events.html
        # Spaces that keep the connection open stand before a line.
        line = line.removeprefix(b"\xef\xbb\xbf").strip()
        if line.startswith(b":"):
            yield line + b"\n\n"
        elif not line and self._lines:
            data = b" ".join(self._lines)
            self._lines.clear()
            self._size = 0
            yield from self._chunk(data, self._decode(data))
        elif line.startswith(b"event:") and line.removeprefix(b"event:").strip() == b"error":
            self._is_error = True
        elif line.startswith(b"data:"):
            data = line.removeprefix(b"data:").strip()
            # Some servers send no empty line after each event, so a line that is JSON is an event.
            if data == b"[DONE]":
                self._is_complete = True
            elif self._lines or (chunk := self._decode(data)) is None:
                self._lines.append(data)
                self._size += len(data)
                check_size(self._size)
            else:
                yield from self._chunk(data, chunk)

    def _chunk(self, data: bytes, chunk: Any) -> Iterator[bytes]:
        """Other data is passed on as it is: the reader reports it."""
        if self._is_error or _is_failure(chunk):
            self._is_error = False
            yield _event({"error": chunk or "event"})
            return
        if not isinstance(chunk, dict) or chunk.get("error") or not isinstance(chunk.get("choices", []), list | None):
            yield b"data: " + data + b"\n\n"
            return
        self._repair(chunk)
        yield _event(chunk)

    def _decode(self, data: bytes) -> Any:
        try:
            chunk = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            chunk = _decode_damaged(data)
            self._hold_halves(chunk)
            return without_halves(chunk)
        if self._halves:
            self._hold_halves(chunk)
            return without_halves(chunk)
        return chunk

    def _hold_halves(self, chunk: Any) -> None:
        """Moves a half character at the end of a text to the beginning of the next one."""
        for choice in _list(_mapping(chunk).get("choices"))[:1]:
            delta = _mapping(_mapping(choice).get("delta"))
            calls = [_mapping(_mapping(call).get("function")) for call in _list(delta.get("tool_calls"))[-1:]]
            for place, name in (*((delta, name) for name in _TEXTS), *((call, "arguments") for call in calls)):
                if isinstance(text := place.get(name), str) and text:
                    text = self._halves.pop(name, "") + text
                    if "\ud800" <= text[-1] <= "\udbff":
                        text, self._halves[name] = text[:-1], text[-1]
                    place[name] = text

    def _repair(self, chunk: Chunk) -> None:
        self._base = {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
        # A later total replaces an earlier one. They are never added.
        # Groq reports it in a field of its own.
        # Moonshot reports it in the choice.
        choices = map(_mapping, _list(chunk.get("choices"))[:1])
        reported = chunk.pop("usage", None) or _mapping(chunk.get("x_groq")).get("usage")
        reported = reported or next((choice["usage"] for choice in choices if "usage" in choice), None)
        for name, value in _mapping(reported).items():
            # A part that a later chunk does not report is 0 or null there.
            if value or (value is not None and name not in self._reported):
                self._reported[name] = value
        if len(self._reported) > MAX_FIELDS:
            raise TooLarge(f"the usage has more than {MAX_FIELDS} fields")
        self._usage = usage(self._reported) or self._usage
        chunk["choices"] = [choice for choice in chunk.get("choices") or () if self._is_ours(choice)]
        for choice in chunk["choices"]:
            # Some servers send a whole message as a chunk, others repeat it at the end.
            whole = None if self._has_content else choice.get("message")
            delta = choice["delta"] = choice.get("delta") or whole or {}
            choice.setdefault("index", 0)
            if choice.get("finish_reason") in _NO_FINISHES:
                choice["finish_reason"] = None
            self._finish = choice["finish_reason"] or self._finish
            # The old completions have a text instead of a message.
            content = _text(delta.get("content") or choice.get("text")) + _images(delta)
            delta["content"] = self.thoughts.feed(content)
            if choice["finish_reason"]:
                delta["content"] += self.thoughts.flush()
            calls = delta.get("tool_calls")
            if not calls and isinstance(call := delta.get("function_call"), dict):
                # As it was before there were tools.
                calls = [{"index": 0, "function": call}]
            if calls:
                delta["tool_calls"] = self._calls.feed(calls if isinstance(calls, list) else [calls])
            self._has_content = self._has_content or bool(content or self._calls.count)

    def _is_ours(self, choice: Any) -> bool:
        if not isinstance(choice, dict):
            return False
        if self._choice is None:
            self._choice = choice.get("index", 0)
        return bool(choice.get("index", 0) == self._choice)

    def _end(self) -> Iterator[Chunk]:
        """The chunks that are missing before the end of a complete answer."""
        if self._finish is None and self._has_content:
            finish = "tool_calls" if self._calls.count else "stop"
            delta = {"content": self.thoughts.flush()}
            yield self._base | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
        # An answer with content has output. Zero would make it free.
        if self._usage and not (self._has_content and self._usage["completion_tokens"] == 0):
            yield self._base | {"choices": [], "usage": self._usage}


def _is_failure(chunk: Any) -> bool:
    """An error of the server in a shape of its own, such as vLLM's, FastAPI's, MiniMax' and OpenRouter's."""
    if not isinstance(chunk, dict):
        return any(_mapping(one).get("error") for one in _list(chunk)[:1])
    choices = map(_mapping, _list(chunk.get("choices")))
    if _mapping(chunk.get("base_resp")).get("status_code") or any(choice.get("error") for choice in choices):
        return True
    if chunk.get("choices") or chunk.get("usage"):
        return False
    told = (chunk.get(name) for name in ("message", "detail", "msg"))
    return chunk.get("object") == "error" or bool(chunk.get("errors")) or any(isinstance(one, str) for one in told)


def _text(content: Any) -> str:
    """The text of a content, which may be a part or a list of parts. Thoughts may be among the parts."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in _PARTS else part
        texts += [text] if isinstance(text, str) else []
    return "".join(texts)


def _images(delta: Chunk) -> str:
    """The images that a model has made, in Markdown. They are parts of the content, or beside it as OpenRouter sends
    them."""
    parts = map(_mapping, (*_list(delta.get("content")), *_list(delta.get("images"))))
    urls = (_mapping(part.get("image_url")).get("url") for part in parts if part.get("type") == "image_url")
    return "".join(f"\n\n![image]({url})" for url in urls if isinstance(url, str))


def _decode_damaged(data: bytes) -> Any:
    """JSON with halves of characters, which remain in its texts as surrogates. None if it is not JSON."""
    try:
        return json.loads(data.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None


def without_halves(value: Any) -> Any:
    """The value with whole characters in all texts. A half without its other half becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [without_halves(item) for item in value]
    if isinstance(value, dict):
        return {without_halves(name): without_halves(item) for name, item in value.items()}
    return value


def _event(chunk: Chunk) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def usage(given: Any) -> Chunk | None:
    """The usage in OpenAI's shape; None if it is not reported.

    A usage without plausible counts counts as not reported: it must not become zero tokens. The prompt is never empty.
    """
    if not isinstance(given, dict):
        return None
    prompt = _first_count(given.get("prompt_tokens"), given.get("input_tokens"))
    completion = _first_count(given.get("completion_tokens"), given.get("output_tokens"))
    if prompt is None or completion is None:
        return None
    details = _mapping(given.get("prompt_tokens_details")), _mapping(given.get("input_tokens_details"))
    missing = (_first_count(given.get("total_tokens")) or 0) - prompt - completion
    beside = sum(_first_count(given.get(name)) or 0 for name in _BESIDE_INPUT)
    if beside and not any(details) and (missing == beside or "prompt_tokens" not in given):
        prompt, missing = prompt + beside, missing - beside
    if not prompt:
        return None
    cached = _first_count(
        *(detail.get("cached_tokens") for detail in details),
        given.get("prompt_cache_hit_tokens"),
        given.get("cached_tokens"),
        given.get("cache_read_input_tokens"),
    )
    completion_details = _mapping(given.get("completion_tokens_details"))
    reasoning = _first_count(completion_details.get("reasoning_tokens"), given.get("reasoning_tokens"))
    if not reasoning and missing > 0 and missing != cached:
        # Gemini counts thoughts in the total only. Some servers count cached tokens there.
        reasoning = missing
    if reasoning and (reasoning > completion or reasoning == missing):
        # xAI and some proxies for Gemini report thoughts beside the output instead of as a part of it.
        completion += reasoning
    found: Chunk = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    # More cached tokens than tokens: charged as input.
    if cached is not None and cached <= prompt:
        found["prompt_tokens_details"] = {"cached_tokens": cached}
    if reasoning is not None and reasoning <= completion:
        found["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return found


def _mapping(value: Any) -> Chunk:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first_count(*values: Any) -> int | None:
    """The first of the values that is a count. A number may be a string; it may not be negative or a fraction."""
    for value in values:
        if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 16:
            value = int(value)
        is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS
        if is_count and value == int(value):
            return int(value)
    return None
