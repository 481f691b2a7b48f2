"""The answer to a completion: follows the run to its end, and sends the reply whole or as a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from uuid import UUID

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infra.errors import NotFound, TooManyRequests
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.domain import Fact, Follow, StreamEvent
from services.ws_gateway.feed import Live, Missed
from services.ws_gateway.hub import Hub
from services.ws_gateway.openai import agents, errors
from services.ws_gateway.openai.conversation import FunctionCall
from services.ws_gateway.openai.domain import Piece, TakenBack, Transcript
from services.ws_gateway.openai.errors import CompletionError
from services.ws_gateway.openai.shapes import UNREPORTED, Finish, Reply, Shape, Usage
from services.ws_gateway.run_events import run_events
from services.ws_gateway.stream import HEADERS, HEARTBEAT, StreamClient, until_disconnect

_log = get_logger("ws_gateway.openai")


class AnswerResponse(Response):
    """`kept` is True if the client gave an idempotency key and can fetch the answer later. A run without one is
    cancelled if it has not ended when its client goes or when its answer cannot be sent.
    """

    def __init__(
        self, hub: Hub, agent: Agent, who: Identity, run_id: UUID, shape: Shape, *, stream: bool, kept: bool
    ) -> None:
        super().__init__()
        self._hub = hub
        self._agent = agent
        self._client = StreamClient(hub.clients, who)
        self._run_id = run_id
        self._shape = shape
        self._stream = stream
        self._kept = kept
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = self._client
        writer = _Writer(client, scope, receive, send, self._shape, self._run_id)
        try:
            with self._hub.clients.watched(client), self._hub.listen(self._run_id, client.room) as live:
                # Makes the reader fetch the past facts first.
                live.push(Missed())
                connected = await until_disconnect(self._write(live, writer), client, receive)
        except TooManyRequests as error:
            connected = False
            await writer.fail(errors.of(error))
        finally:
            if not (self._over or self._kept):
                await agents.cancel(self._agent, self._client.who, self._run_id)
        if connected and not writer.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await writer.fail(errors.restarting())

    async def _write(self, live: Live, writer: _Writer) -> None:
        try:
            try:
                await (self._write_parts if self._stream else self._write_whole)(live, writer)
            except (CompletionError, TooManyRequests) as failure:
                await writer.fail(errors.of(failure))
        except TimeoutError:
            _log.info("client does not read its answer; the connection is dropped")

    async def _write_whole(self, live: Live, writer: _Writer) -> None:
        reply = Reply("")
        async with aclosing(self._events(live)) as batches:
            async for events in batches:
                for event in events:
                    if event.name == "reply":
                        reply = _reply(event)
        await writer.whole(reply, await self._usage())

    async def _write_parts(self, live: Live, writer: _Writer) -> None:
        transcript = Transcript()
        reply = Reply("")
        async with aclosing(self._events(live)) as batches:
            async for events in batches:
                if not events:
                    await writer.heartbeat()
                for event in events:
                    try:
                        piece = _piece(transcript, event)
                    except TakenBack:
                        raise errors.rewritten() from None
                    if piece and piece.text:
                        await writer.text(piece)
                    if event.name == "reply":
                        reply = _reply(event)
                        if reply.calls:
                            await writer.calls(reply.calls)
        usage = await self._usage() if self._shape.wants_usage else UNREPORTED
        await writer.end(usage, reply.finish_reason)

    async def _events(self, live: Live) -> AsyncGenerator[list[StreamEvent]]:
        """The run's events until its reply. Raises CompletionError if the run ends without a reply."""
        try:
            async with aclosing(run_events(self._read, live, Follow(0))) as batches:
                async for events in batches:
                    for event in events:
                        if failure := errors.ended_without_reply(event):
                            self._over = True
                            raise failure
                    yield events
            self._over = True
        except NotFound:
            self._over = True
            raise errors.run_gone() from None

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._client.who)

    async def _usage(self) -> Usage:
        return await agents.usage(self._agent, self._client.who, self._run_id)


class _Writer:
    """Sends one answer. Raises TimeoutError if the client does not read. The status of a stream is sent with its first
    text or heartbeat: until then a failure can still have its own status.
    """

    def __init__(
        self, client: StreamClient, scope: Scope, receive: Receive, send: Send, shape: Shape, run_id: UUID
    ) -> None:
        self._client = client
        self._asgi = scope, receive, send
        self._send = send
        self._shape = shape
        self._headers = {"x-claw-run-id": str(run_id)}
        self._begun = False
        self.ended = False

    async def whole(self, reply: Reply, usage: Usage) -> None:
        self.ended = True
        response = Response(
            msgspec.json.encode(self._shape.whole(reply, usage)), 200, self._headers, media_type="application/json"
        )
        start = {"type": "http.response.start", "status": 200, "headers": response.raw_headers}
        await self._client.send_part(self._send, bytes(response.body), start)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def heartbeat(self) -> None:
        await self._begin()
        await self._client.send_part(self._send, HEARTBEAT)

    async def text(self, piece: Piece) -> None:
        await self._begin()
        await self._client.send_part(self._send, self._shape.text(piece))

    async def calls(self, calls: Sequence[FunctionCall]) -> None:
        await self._begin()
        await self._client.send_part(self._send, self._shape.calls(calls))

    async def end(self, usage: Usage, finish: Finish) -> None:
        await self._begin()
        await self._last(self._shape.end(usage, finish))

    async def fail(self, failure: CompletionError) -> None:
        if self._begun:
            await self._last(self._shape.failed(failure))
        else:
            await self._respond(failure.response(self._headers))

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            own = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *own]})
            await self._client.send_part(self._send, self._shape.begin())

    async def _last(self, body: bytes) -> None:
        await self._client.send_part(self._send, body)
        self.ended = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _respond(self, response: Response) -> None:
        self.ended = True
        await response(*self._asgi)


def _reply(event: StreamEvent) -> Reply:
    return msgspec.convert(event.data, Reply)


def _piece(transcript: Transcript, event: StreamEvent) -> Piece | None:
    """The text that the event adds to the answer. Raises TakenBack."""
    match event.name:
        case "step.started":
            transcript.began(event.data["step"], event.data["kind"], event.data["attempt"])
        case "delta":
            return transcript.delta(event.data)
        case "reply":
            return transcript.reply(event.data["text"])
    return None
