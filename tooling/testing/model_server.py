"""A fake of model providers: OpenAI's ``/v1/chat/completions`` and Anthropic's ``/v1/messages``.

It refuses every request that the provider would refuse (authorisation, shape, order of messages, tools). It gives the
scripted answers of a model in their order, and otherwise echoes the last user message. It streams if the request says
so, and it keeps a ledger.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from infra.observe.metrics import Metrics
from infra.web.health import Health
from infra.web.http import create_app
from infra.web.server import serve_http
from tooling.testing import model_shapes as shapes

KEY = "a model key made up for tests"


@dataclass(frozen=True)
class Says:
    """An answer with its faults."""

    text: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """Tool calls: name, and arguments as JSON text."""
    usage: tuple[int, int, int, int] | None = (12, 0, 5, 0)
    """Tokens: input (cached ones included), cached, output (reasoning included), reasoning. None: not reported."""
    stalls_after: int | None = None
    """After this number of pieces of the text the response stays open and silent."""
    cut_after: int | None = None
    """After this number of pieces the connection breaks."""
    closed_after: int | None = None
    """After this number of pieces the response ends properly, although the answer is not complete."""
    whole: bool = False
    """The answer comes in one piece, although the request asked for a stream."""
    waits: asyncio.Event | None = None
    """The answer comes only after this event is set."""
    comments: bool = False
    """Only comments come, until `release`."""
    endless: bool = False
    """The text is repeated without end."""
    drips_every: float = 0.0
    """Seconds between two events of the stream."""
    packet: int | None = None
    """The stream is sent in pieces of this number of bytes, also through the middle of events and characters."""

    @property
    def pieces(self) -> list[str]:
        return [self.text[n : n + 4] for n in range(0, len(self.text), 4)]

    def has(self, event: str) -> bool:
        """Whether this event of a stream contains a piece of the text."""
        return any(json.dumps(piece, ensure_ascii=False) in event for piece in self.pieces)


@dataclass(frozen=True)
class Fails:
    """An HTTP error. `retry_after`: seconds, as header."""

    status: int
    retry_after: int | None = None


@dataclass(frozen=True)
class Streams:
    """An answer in the bytes of a server that has the shape of OpenAI and not its details."""

    chunks: tuple[dict[str, Any] | bytes, ...]
    """Bytes are sent as they are."""
    done: bool = True
    """The stream ends with ``[DONE]``."""


@dataclass(frozen=True)
class Refuses:
    """An HTTP error with this body."""

    status: int
    body: Any


@dataclass(frozen=True)
class Asked:
    """A well-formed request."""

    path: str
    model: str
    body: dict[str, Any]
    at: float = field(default_factory=perf_counter)
    """When it came, by `perf_counter`."""

    @property
    def last_user_text(self) -> str:
        content = [message for message in self.body["messages"] if message["role"] == "user"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

    @property
    def system(self) -> str:
        if "system" in self.body:
            found = self.body["system"]
            return found if isinstance(found, str) else "".join(part["text"] for part in found)
        return "".join(m["content"] for m in self.body["messages"] if m["role"] in ("system", "developer"))


class ModelServer:
    """The fake with its scripts and its ledger."""

    def __init__(self) -> None:
        self.url = ""
        """Base URL; it ends in ``/v1``."""
        self.rules: dict[str, Callable[[Asked], Says | Refuses]] = {}
        """Model → how it answers a request if nothing is scripted."""
        self.requests: list[Asked] = []
        """All well-formed requests."""
        self.refused: list[str] = []
        """Why each malformed request was refused."""
        self.tokens: dict[str, Counter[str]] = defaultdict(Counter)
        """Model → input and output tokens as reported."""
        self.took: list[tuple[Asked, float]] = []
        """Requests that were answered completely, each with the seconds that the answer took."""
        self._scripts: dict[str, deque[Says | Fails | Streams | Refuses]] = defaultdict(deque)
        self._closing = asyncio.Event()

    def script(self, model: str, *answers: Says | Fails | Streams | Refuses) -> None:
        """Adds answers to the next requests for `model` (the provider's name of it), in their order."""
        self._scripts[model].extend(answers)

    def scripted(self, model: str) -> deque[Says | Fails | Streams | Refuses]:
        """The scripted answers of `model` that are not used yet. The caller may change them."""
        return self._scripts[model]

    def forget(self) -> None:
        """Removes the scripted answers that are not used yet."""
        self._scripts.clear()

    def asked(self, model: str) -> list[Asked]:
        return [request for request in self.requests if request.model == model]

    def release(self) -> None:
        """Ends all answers that stall or do not end."""
        self._closing.set()

    async def handle(self, request: Request) -> Response:
        shape = shapes.ANTHROPIC if request.url.path.endswith("/messages") else shapes.OPENAI
        try:
            body = json.loads(await request.body())
            shape.check(request.headers, body, KEY)
        except shapes.Refused as refused:
            self.refused.append(f"{request.url.path}: {refused}")
            return JSONResponse(shape.error(refused.status, str(refused)), refused.status)
        asked = Asked(request.url.path, body["model"], body)
        self.requests.append(asked)
        script = self._scripts[asked.model]
        answer = script.popleft() if script else self.rules.get(asked.model, _echo)(asked)
        if isinstance(answer, Refuses):
            return JSONResponse(answer.body, answer.status)
        if isinstance(answer, Streams):
            events = [e if isinstance(e, bytes) else f"data: {json.dumps(e)}\n\n".encode() for e in answer.chunks]
            events += [b"data: [DONE]\n\n"] * answer.done
            return Response(b"".join(events), media_type="text/event-stream")
        if isinstance(answer, Fails):
            headers = {} if answer.retry_after is None else {"retry-after": str(answer.retry_after)}
            return JSONResponse(shape.error(answer.status, "scripted"), answer.status, headers)
        if answer.waits:
            await answer.waits.wait()
        if not body.get("stream") or answer.whole:
            self._answered(asked, answer)
            return JSONResponse(shape.whole(asked.model, answer.text, answer.calls, answer.usage))
        stream = self._stream(shape, asked, answer)
        return StreamingResponse(
            stream if answer.packet is None else _in_packets(stream, answer.packet), media_type="text/event-stream"
        )

    async def _stream(self, shape: shapes.Shape, asked: Asked, answer: Says) -> AsyncIterator[str]:
        wants_usage = shape.reports_usage(asked.body)
        events: Iterator[str] = shape.events(
            asked.model, answer.pieces, answer.calls, answer.usage if wants_usage else None
        )
        while answer.comments and not self._closing.is_set():
            yield ": the model is busy\n\n"
            await asyncio.sleep(0.01)
        while answer.endless and not self._closing.is_set():
            for event in shape.events(asked.model, answer.pieces, (), None):
                if answer.has(event):
                    yield event
            # Sending to a closed connection does not wait, so without this the loop would never learn of it.
            await asyncio.sleep(0)
        for most in (answer.stalls_after, answer.cut_after, answer.closed_after):
            if most is None:
                continue
            sent = 0
            for event in events:
                yield event
                sent += answer.has(event)
                if sent >= most:
                    break
            if answer.cut_after is not None:
                raise ConnectionAbortedError("scripted: cut off")
            if answer.stalls_after is not None:
                await self._closing.wait()
            return
        for event in events:
            yield event
            await asyncio.sleep(answer.drips_every)
        self._answered(asked, answer)

    def _answered(self, asked: Asked, answer: Says) -> None:
        self.took.append((asked, perf_counter() - asked.at))
        if answer.usage:
            self.tokens[asked.model].update(input=answer.usage[0], output=answer.usage[2])


async def _in_packets(stream: AsyncIterator[str], size: int) -> AsyncIterator[bytes]:
    whole = "".join([event async for event in stream]).encode()
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


def _echo(asked: Asked) -> Says:
    return Says(f"You said: {asked.last_user_text}")


@asynccontextmanager
async def model_server() -> AsyncIterator[ModelServer]:
    """The server, running on a free port of the loopback interface."""
    server = ModelServer()
    routes = [
        Route("/v1/chat/completions", server.handle, methods=["POST"]),
        Route("/v1/messages", server.handle, methods=["POST"]),
    ]
    app = create_app(routes, Health("models", "0"), Metrics(CollectorRegistry()), max_body=8_000_000)
    http = await serve_http(app, 0)
    server.url = f"http://127.0.0.1:{http.port}/v1"
    try:
        yield server
    finally:
        server.release()
        await http.stop()
