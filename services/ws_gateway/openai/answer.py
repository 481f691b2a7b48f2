"""The answer to a completion: its run is followed to the end, and told whole or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from uuid import UUID

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infra.errors import NotFound
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.domain import Event, Fact, Follow
from services.ws_gateway.hub import Client, Hub, Live, Missed
from services.ws_gateway.openai import agents, errors
from services.ws_gateway.openai.domain import Piece, TakenBack, Transcript
from services.ws_gateway.openai.errors import Failure
from services.ws_gateway.openai.requests import Call
from services.ws_gateway.openai.shapes import UNREPORTED, Reply, Shape, Usage
from services.ws_gateway.stream import HEADERS, HEARTBEAT, put, while_there
from services.ws_gateway.telling import happenings

_log = get_logger("ws_gateway.openai")


class Answer(Response):
    """`kept`: who asks has the run's idempotency key and may come again for it. Any other run that is not over when its
    client goes, or cannot be told any more, is cancelled.
    """

    def __init__(
        self, hub: Hub, agent: Agent, who: Identity, run_id: UUID, shape: Shape, *, stream: bool, kept: bool
    ) -> None:
        super().__init__()
        self._hub = hub
        self._agent = agent
        self._who = who
        self._run_id = run_id
        self._shape = shape
        self._stream = stream
        self._kept = kept
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        teller = _Teller(scope, receive, send, self._shape, self._run_id)
        try:
            client = Client()
            async with self._hub.listen(self._run_id, client) as live:
                # So that what has happened already is read first.
                live.put(Missed())
                is_there = await while_there(self._tell(live, teller), client, receive)
        finally:
            if not (self._over or self._kept):
                await agents.cancel(self._agent, self._who, self._run_id)
        if is_there and not teller.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await teller.fail(errors.cut_off())

    async def _tell(self, live: Live, teller: _Teller) -> None:
        try:
            try:
                await (self._tell_parts if self._stream else self._tell_whole)(live, teller)
            except Failure as failure:
                await teller.fail(failure)
        except TimeoutError:
            _log.info("a client that takes nothing is dropped")

    async def _tell_whole(self, live: Live, teller: _Teller) -> None:
        reply = Reply("")
        async with aclosing(self._events(live)) as happening:
            async for events in happening:
                for event in events:
                    if event.name == "reply":
                        reply = _reply(event)
        await teller.whole(reply, await self._usage())

    async def _tell_parts(self, live: Live, teller: _Teller) -> None:
        transcript = Transcript()
        async with aclosing(self._events(live)) as happening:
            async for events in happening:
                if not events:
                    await teller.silence()
                for event in events:
                    try:
                        piece = _piece(transcript, event)
                    except TakenBack:
                        raise errors.taken_back() from None
                    if piece and piece.text:
                        await teller.text(piece)
                    if event.name == "reply" and (calls := _reply(event).calls):
                        await teller.calls(calls)
        await teller.end(await self._usage() if self._shape.wants_usage else UNREPORTED)

    async def _events(self, live: Live) -> AsyncGenerator[list[Event]]:
        """What happens until the run has its reply. Raises Failure where it gets none."""
        try:
            async with aclosing(happenings(self._read, live, Follow(0))) as happening:
                async for events in happening:
                    for event in events:
                        if failure := errors.ending(event):
                            self._over = True
                            raise failure
                    yield events
            self._over = True
        except NotFound:
            self._over = True
            raise errors.gone() from None

    async def _read(self, after: int) -> list[Fact]:
        return await self._agent.facts(self._run_id, after, self._who)

    async def _usage(self) -> Usage:
        return await agents.usage(self._agent, self._who, self._run_id)


class _Teller:
    """Sends one answer; TimeoutError where the client takes nothing any more. The status of a stream is sent with its
    first text, or when nothing has come for a while: until then a failure has a status of its own.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, shape: Shape, run_id: UUID) -> None:
        self._asgi = scope, receive, send
        self._send = send
        self._shape = shape
        self._headers = {"x-claw-run-id": str(run_id)}
        self._begun = False
        self.ended = False

    async def whole(self, reply: Reply, usage: Usage) -> None:
        body = msgspec.json.encode(self._shape.whole(reply, usage))
        await self._respond(Response(body, 200, self._headers, media_type="application/json"))

    async def silence(self) -> None:
        await self._begin()
        await put(self._send, HEARTBEAT)

    async def text(self, piece: Piece) -> None:
        await self._begin()
        await put(self._send, self._shape.text(piece))

    async def calls(self, calls: Sequence[Call]) -> None:
        await self._begin()
        await put(self._send, self._shape.calls(calls))

    async def end(self, usage: Usage) -> None:
        await self._begin()
        await self._last(self._shape.end(usage))

    async def fail(self, failure: Failure) -> None:
        if self._begun:
            await self._last(self._shape.failed(failure))
        else:
            await self._respond(failure.response(self._headers))

    async def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            own = [(name.encode(), value.encode()) for name, value in self._headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, *own]})
            await put(self._send, self._shape.begin())

    async def _last(self, body: bytes) -> None:
        await put(self._send, body)
        self.ended = True
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _respond(self, response: Response) -> None:
        self.ended = True
        await response(*self._asgi)


def _reply(event: Event) -> Reply:
    return msgspec.convert(event.data, Reply)


def _piece(transcript: Transcript, event: Event) -> Piece | None:
    """What the event adds to the text. Raises TakenBack."""
    match event.name:
        case "step.started":
            transcript.began(event.data["step"], event.data["kind"], event.data["attempt"])
        case "delta":
            return transcript.delta(event.data)
        case "reply":
            return transcript.reply(event.data["text"])
    return None
