"""Lines and tool calls that a server streams in pieces. The time is linear in the stream: all tenants share it."""

from __future__ import annotations

import json
import re
from asyncio import get_running_loop, sleep
from collections import Counter
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from itertools import pairwise
from time import monotonic
from typing import Any
from uuid import uuid4

import httpx2
import msgspec

from infra.errors import TooLarge
from infra.outgoing.shares import tenant
from services.agent.models.contract import ModelFailed

Chunk = dict[str, Any]
# Of one event, or of an answer in one piece. Lists of JSON take twenty times as much memory.
MAX_EVENT_BYTES = 4 * 1024**2
MAX_ERROR_BYTES = 64 * 1024
# Servers write two or three.
MAX_EVENT_LINES = 1_000
LINES_A_SECOND = 10_000
"""Of all answers of a tenant in a process: about 5,000 tokens, which take a quarter of a processor core."""
LINES_A_TURN = 200
"""Of all answers of a tenant in one turn of the event loop: about 100 tokens, which take some milliseconds."""
MAX_CALLS = 200
"""Of one answer. Each call takes twenty times the memory of its piece of the stream."""
MAX_FIELDS = 100
"""Of one call or usage, beside the known ones."""
# The fields of a tool call; a server may have more.
CALL_FIELDS = ("index", "id", "type", "function", "name", "arguments")
# The end of an answer of Anthropic's shape. Some servers give no reason, others do not tell the end.
_END = re.compile(rb'"message_stop"|"stop_reason"\s*:\s*"|"error"')
# The signs of JSON that open and close a part. A sign after a backslash does neither.
_BRACKETS = re.compile(r'["{}\[\]]|\\.?', re.DOTALL)


class Pace:
    """Bounds the lines of all answers of a tenant that this process reads, by second and by turn of the event loop.
    Each token costs CPU time there, and a server of the tenant could send them without a pause. The bound by second is
    too much for a process that gets only a part of a processor core."""

    def __init__(self) -> None:
        self._in_turn: Counter[str] = Counter()
        # Tenant → the time at which its lines until now would have come at the bound, the latest asker last.
        self._due: dict[str, float] = {}

    async def count(self, number: int) -> None:
        """Waits if the tenant's lines have come more than a second too early, or if it had its share of this turn."""
        whose, now = tenant.get(), monotonic()
        due = max(self._due.pop(whose, now), now) + number / LINES_A_SECOND
        self._due[whose] = due
        while self._due[first := next(iter(self._due))] < now:
            del self._due[first]
        if due > now + 1:
            await sleep(due - now - 1)
        while self._in_turn[whose] >= LINES_A_TURN:  # noqa: ASYNC110 - a turn has no event
            await sleep(0)
        if not self._in_turn:
            get_running_loop().call_soon(self._in_turn.clear)
        self._in_turn[whose] += number


_pace = Pace()


async def lines(stream: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream without their ends, also the last one. Raises TooLarge."""
    rest: list[bytes] = []
    size = 0
    async for piece in stream:
        first, *others = piece.split(b"\n")
        rest.append(first)
        size += len(first)
        check_size(size)
        if others:
            ended = [b"".join(rest), *others[:-1]]
            for start in range(0, len(ended), LINES_A_TURN):
                part = ended[start : start + LINES_A_TURN]
                await _pace.count(len(part))
                for line in part:
                    yield line
            rest, size = [others[-1]], len(others[-1])
    yield b"".join(rest)


def check_size(size: int) -> None:
    """Raises TooLarge if an event of so many bytes is not read."""
    if size > MAX_EVENT_BYTES:
        raise TooLarge(f"the answer has a part of more than {MAX_EVENT_BYTES // 1024**2} MiB")


async def as_events(content: AsyncIterator[bytes], of_whole: Callable[[bytes], bytes]) -> AsyncIterator[bytes]:
    """The answer as events. The first bytes decide how to read it, because many servers send a wrong content type.

    `of_whole`: the events of an answer that comes as one JSON. Raises ModelFailed, TooLarge.
    """
    first = b""
    async for piece in content:
        # Servers send spaces to keep the connection open, and some a byte order mark.
        if first := piece.lstrip(b" \t\r\n\xef\xbb\xbf"):
            break
    if first.startswith(b"<"):
        raise ModelFailed("the answer is a web page (is the provider's base_url right?)", transient=True)
    if not first.startswith((b"{", b"[")):
        return _chain(first, content)
    whole = bytearray(first)
    check_size(len(whole))
    async for piece in content:
        whole += piece
        check_size(len(whole))
    return _chain(of_whole(bytes(whole)), content)


async def _chain(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in rest:
        yield piece


class ShortErrors(httpx2.AsyncBaseTransport):
    """A transport whose error answers are cut after MAX_ERROR_BYTES: libraries read them whole, and as JSON."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if response.status_code != 200:
            response.stream = _Beginning(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Beginning(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MAX_ERROR_BYTES
        async with aclosing(aiter(self._stream)) as pieces:
            async for piece in pieces:
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    break

    async def aclose(self) -> None:
        await self._stream.aclose()


class WholeEvents(httpx2.AsyncBaseTransport):
    """A transport whose answers of Anthropic's shape come event by event, also if the server sends one JSON. Libraries
    take quadratic time for an event of many lines, and for one that comes in many pieces. Events have a name and a
    usage, which may be zero."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if response.status_code == 200:
            response.stream = _Events(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class _Events(httpx2.AsyncByteStream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        event: list[bytes] = []
        count = size = 0
        has_begun = has_ended = False
        async for line in lines(await as_events(aiter(self._stream), _message_events)):
            has_begun = has_begun or b'"message_start"' in line
            has_ended = has_ended or _END.search(line) is not None
            event.append(line)
            size += len(line)
            check_size(size)
            # A line may also end with this sign alone.
            count += 1 + line.count(b"\r")
            if count > MAX_EVENT_LINES:
                raise TooLarge(f"an event of the stream has more than {MAX_EVENT_LINES} lines")
            if not line.strip(b"\r"):
                yield b"\n".join((*_repaired(event), b""))
                event.clear()
                count = size = 0
        if event:
            yield b"\n".join(_repaired(event))
        if has_begun and not has_ended:
            # A proxy cut the stream and then closed the connection normally.
            raise ModelFailed("the answer was cut off", transient=True)

    async def aclose(self) -> None:
        await self._stream.aclose()


def _message_events(body: bytes) -> bytes:
    """A message of Anthropic's shape as the events of a stream. Any other body becomes one event, unchanged."""
    try:
        message = msgspec.json.decode(body)
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        # The answer is complete, even if it has no reason to end.
        end = {"stop_reason": message.get("stop_reason") or "end_turn", "stop_details": message.get("stop_details")}
        events: list[Chunk] = [
            {"type": "message_start", "message": message | {"content": []}},
            *({"type": "content_block_start", "index": n, "content_block": block} for n, block in enumerate(blocks)),
            {"type": "message_delta", "delta": end, "usage": message.get("usage")},
            {"type": "message_stop"},
        ]
    except (msgspec.DecodeError, LookupError, TypeError, AttributeError, RecursionError):
        name = b"event: error\n" if b'"error"' in body else b""
        return name + b"data: " + body.replace(b"\n", b" ") + b"\n\n"
    return b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in events)


def _repaired(event: Sequence[bytes]) -> list[bytes]:
    """The lines of an event, with the name and the usage that Anthropic's library needs."""
    found = [_with_usage(line) for line in event]
    if not any(line.startswith(b"event:") for line in event):
        for line in event:
            with suppress(msgspec.DecodeError, RecursionError):
                found.insert(
                    0, b"event: " + msgspec.json.decode(line.removeprefix(b"data:"), type=_Named).type.encode()
                )
                break
    return found


class _Named(msgspec.Struct):
    type: str


def _with_usage(line: bytes) -> bytes:
    """The line with a usage of zero, if it is an event that has none: Anthropic's library fails without it."""
    if not (line.startswith(b"data:") and (b'"message_start"' in line or b'"message_delta"' in line)):
        return line
    with suppress(msgspec.DecodeError, RecursionError):
        data = msgspec.json.decode(line.removeprefix(b"data:"))
        place = data.get("message", data) if isinstance(data, dict) else None
        if isinstance(place, dict) and place.get("usage") is None:
            place["usage"] = {"input_tokens": 0, "output_tokens": 0}
            return b"data: " + msgspec.json.encode(data)
    return line


def whole_arguments(pieces: Sequence[str]) -> str:
    """The arguments of a call. Some servers repeat them: from the start in each piece, or as a whole. Some models write
    them as JSON within a text.
    """
    joined = "".join(pieces)
    if joined.startswith('"'):
        with suppress(msgspec.DecodeError):
            joined = msgspec.json.decode(joined, type=str)
    if joined.strip() == "null":
        return ""
    if _is_object(joined):
        return joined
    # A proxy for Anthropic's models begins with the empty input of the call.
    if joined.startswith("{}") and _is_object(later := joined.removeprefix("{}")):
        return later
    if len(pieces) < 2 or not _is_object(pieces[-1]):
        return _first_of_repeats(joined)
    totals = all(later.startswith(former) for former, later in pairwise(pieces))
    return pieces[-1] if totals or "".join(pieces[:-1]) == pieces[-1] else joined


def _first_of_repeats(text: str) -> str:
    """The object, if the text is nothing but repeats of it; else the text."""
    with suppress(ValueError, RecursionError):
        value, end = json.JSONDecoder().raw_decode(text)
        if isinstance(value, dict) and text == text[:end] * (len(text) // end):
            return text[:end]
    return text


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except msgspec.DecodeError:
        return False


def _index(given: object) -> int | None:
    """Servers of other languages write it as a text or a fraction."""
    try:
        return int(given) if isinstance(given, str | int | float) else None
    except ValueError:
        return None


class _Call:
    def __init__(self, index: int, given_id: str | None, id_: str) -> None:
        self.index = index
        self.given_id = given_id
        self.id = id_
        self.name = ""
        self._pieces: list[str] = []
        self._size = 0
        """The characters of the pieces."""
        self._depth = 0
        self._in_text = self._is_escaped = False
        self._is_complete: bool | None = None

    def add(self, arguments: str) -> None:
        if not arguments:
            return
        if not self._depth and self._pieces and arguments.strip():
            # Something follows the end.
            self._is_complete = False
        self._pieces.append(arguments)
        self._size += len(arguments)
        begin = 1 if self._is_escaped else 0
        self._is_escaped = False
        for sign in _BRACKETS.findall(arguments, begin):
            if sign[0] == "\\":
                self._is_escaped = sign == "\\"
            elif sign == '"':
                self._in_text = not self._in_text
            elif not self._in_text:
                self._depth += 1 if sign in "{[" else -1

    def is_made(self, name: str, arguments: str) -> bool:
        """Whether it is this call, and a whole one."""
        is_as_long = len(arguments) == self._size
        return is_as_long and (name, arguments) == (self.name, "".join(self._pieces)) and self.is_complete()

    def is_complete(self) -> bool:
        """Whether the arguments so far are a whole object."""
        if self._depth or self._in_text or not self._pieces:
            return False
        if self._is_complete is None:
            self._is_complete = _is_object("".join(self._pieces))
        return self._is_complete


class ToolCalls:
    """Gives each tool call an index and an id of its own.

    A piece with a name begins a call, unless the server repeats the name in each piece. A piece without one continues
    the call with its index, else with its id, else the last one. A call that is sent again with its id counts once.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_given_id: dict[str, _Call] = {}
        self._ids: set[str] = set()

    @property
    def count(self) -> int:
        return len(self._calls)

    def feed(self, pieces: list[Any]) -> list[Chunk]:
        """Raises TooLarge."""
        sent = (self._piece(piece) for piece in pieces if isinstance(piece, dict))
        return [piece for piece in sent if piece is not None]

    def _piece(self, piece: Chunk) -> Chunk | None:
        """None if it says nothing: some servers send each field of an answer, with empty values."""
        index, id_ = _index(piece.get("index")), piece.get("id")
        given_id = str(id_) if id_ and isinstance(id_, str | int) else None
        function = piece.get("function")
        # Some servers send the function's fields beside the id.
        function = function if isinstance(function, dict) else piece
        name, arguments = function.get("name"), function.get("arguments")
        name = name.strip() or None if isinstance(name, str) else None
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        call = self._found(index, given_id)
        if call is None and name is None and self._calls:
            call = self._calls[-1]
        if not (call or given_id or name or arguments):
            return None
        if call and given_id and name and call.given_id == given_id and call.is_made(name, arguments):
            name, arguments = None, ""
        if call is None or (name and self._begins(call, given_id, arguments)):
            call = self._new(given_id)
        elif call.name:
            name = None
        if index is not None:
            self._by_index[index] = call
        call.add(arguments)
        sent: Chunk = {field: value for field, value in piece.items() if field not in CALL_FIELDS}
        sent |= {"index": call.index, "function": {"arguments": arguments}}
        if name:
            call.name = name
            sent |= {"id": call.id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return sent

    def _found(self, index: int | None, given_id: str | None) -> _Call | None:
        same = self._by_given_id.get(given_id) if given_id else None
        if index is not None:
            call = self._by_index.get(index)
            # Some servers write several calls in turns under one index.
            return same if call and call.given_id and same and call.given_id != given_id else call
        if same:
            return same
        return self._calls[-1] if self._calls and not given_id else None

    def _begins(self, call: _Call, given_id: str | None, arguments: str) -> bool:
        if given_id and call.given_id and given_id != call.given_id:
            return True
        return bool(arguments.strip()) and call.is_complete()

    def _new(self, given_id: str | None) -> _Call:
        index = len(self._calls)
        if index == MAX_CALLS:
            raise TooLarge(f"the answer has more than {MAX_CALLS} tool calls")
        # Unlike any of earlier answers: Anthropic refuses a conversation with an id twice.
        id_ = given_id or f"call_{uuid4().hex[:12]}"
        call = _Call(index, given_id, id_ if id_ not in self._ids else f"{id_}_{index}")
        self._calls.append(call)
        self._ids.add(call.id)
        if given_id:
            self._by_given_id[given_id] = call
        return call
