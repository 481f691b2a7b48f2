"""The WebSocket: one client follows many runs and sends messages to agents. `protocol` has the messages."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from functools import partial
from typing import Any, assert_never, cast
from uuid import UUID

import msgspec
from opentelemetry.trace import SpanKind

from infra.errors import Conflict, Forbidden, InvalidMessage, NotFound, TooManyRequests, WrongType
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.outgoing.shares import Held
from infra.security.auth import Identity
from infra.service.refusals import Refusals
from infra.web.http import decode_json
from infra.web.problems import problem
from services.ws_gateway.agent import Agent, AgentRefused, read_until_available
from services.ws_gateway.clients import End
from services.ws_gateway.connection import Connection, text_frame
from services.ws_gateway.domain import Delta, Fact, Follow, StreamEvent
from services.ws_gateway.feed import Feed, Live, Missed, Room, event_frame
from services.ws_gateway.hub import Hub
from services.ws_gateway.protocol import (
    Accepted,
    Cancel,
    ClientMessage,
    Error,
    FieldError,
    Message,
    Ping,
    Pong,
    ServerMessage,
    Subscribe,
    Unsubscribe,
    ref_of,
)

MAX_RUNS = 1_000
# With more unanswered messages, nothing more is read from the client.
MAX_UNANSWERED = 16
FREE_BYTES = 4 * 1024
"""Of a client's messages that are not answered, so many take no share of the tenant's."""

_log = get_logger("ws_gateway.socket")
_FROM_CLIENT = cast("type[ClientMessage]", ClientMessage)
_encoder = msgspec.json.Encoder()


class _Problem(msgspec.Struct):
    detail: str
    errors: list[FieldError] = []


class Socket(Connection):
    """A client's WebSocket. `who` is the identity of the handshake; its scopes are checked again every few seconds.

    Messages are handled in order: the next one after the answer to the one before. Only `subscribe` is answered later,
    when its run was read. The socket has a task only while it answers messages or catches up with a run.
    """

    __slots__ = (
        "__weakref__",
        "_agent",
        "_held",
        "_hub",
        "_refusals",
        "_room",
        "_runs",
        "_tasks",
        "_unanswered",
        "_unsent",
        "_waiting",
        "who",
    )

    def __init__(self, hub: Hub, agent: Agent, who: Identity, refusals: Refusals) -> None:
        super().__init__()
        self.who = who
        self._hub = hub
        self._agent = agent
        self._refusals = refusals
        self._room: Room | None = None
        # The task while the socket catches up with a run, its feed after that.
        self._runs: dict[UUID, asyncio.Task[None] | Feed] = {}
        # None if no message waits for its answer.
        self._unanswered: deque[str | None] | None = None
        # The characters of the messages that are not answered.
        self._waiting = 0
        # The bytes that are taken for messages that are not answered, and for answers that the client has not read.
        self._held = Held(hub.clients.held, who.tenant_id)
        self._unsent = Held(hub.clients.unsent, who.tenant_id)
        self._tasks: set[asyncio.Task[None]] = set()

    def on_open(self) -> None:
        try:
            self._hub.clients.enter(self)
        except TooManyRequests:
            self.end(End.TOO_MANY)

    def end(self, reason: End) -> None:
        self.close(*reason.value)

    def on_slow(self) -> None:
        if self.is_open:
            _log.info("client reads too slowly; closed its socket")
            self.end(End.TOO_SLOW)

    def on_unsent(self, size: int) -> None:
        if not self._unsent.resize(size):
            self.end(End.TOO_MUCH_UNREAD)
            # It would not read the close frame, and the memory is needed.
            self.transport.abort()

    def on_shutdown(self) -> None:
        self.end(End.RESTARTING)

    def on_end(self) -> None:
        self._hub.clients.leave(self)
        self._hold()
        for task in self._tasks:
            task.cancel()
        for feed in self._runs.values():
            if isinstance(feed, Feed):
                self._leave(feed)
        self._runs.clear()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._hold()

    def on_message(self, text: str | None) -> None:
        self._waiting += len(text or "")
        if self._unanswered is not None:
            self._unanswered.append(text)
            if len(self._unanswered) == MAX_UNANSWERED:
                self.transport.pause_reading()
            return
        self._unanswered = deque((text,))
        self._start(self._answer_all(self._unanswered))

    def _hold(self) -> None:
        """Takes the client's bytes from the tenant's share, or gives them back. Without a share the socket ends."""
        size = self.unread + self._waiting
        if not self._held.resize(size if size > FREE_BYTES and self.is_open else 0):
            self.end(End.TOO_MUCH)
            # It could go on sending until it answers the close frame.
            self.transport.abort()

    async def read(self, run_id: UUID, after: int) -> list[Fact]:
        return await self._agent.facts(run_id, after, self.who)

    def run_ended(self, run_id: UUID) -> None:
        if isinstance(feed := self._runs.pop(run_id, None), Feed):
            self._hub.release(feed)

    def run_failed(self, run_id: UUID, error: Exception) -> None:
        self.run_ended(run_id)
        self._refuse(error, None)

    async def _answer_all(self, messages: deque[str | None]) -> None:
        while messages and self.is_open:
            # A client that does not read its answers gets no new ones.
            await self.drained()
            text = messages.popleft()
            await self._answer(text)
            self._waiting -= len(text or "")
            self._hold()
            if len(messages) == MAX_UNANSWERED - 1 and self.is_open:
                self.transport.resume_reading()
        self._unanswered = None

    async def _answer(self, text: str | None) -> None:
        message: ClientMessage | None = None
        try:
            if text is None:
                raise WrongType("body", "must be a text frame with JSON, not a binary frame")
            message = decode_json(text.encode(), _FROM_CLIENT)
            try:
                await self._handle(message)
            except Forbidden:
                await self._refusals.record_message(self.who, f"GET /ws {message.__struct_config__.tag}")
                raise
        except Exception as error:
            self._refuse(error, message.ref if message else ref_of(text or ""))

    async def _handle(self, message: ClientMessage) -> None:
        match message:
            case Subscribe(run_id=run_id):
                self._need("read")
                await self._unfollow(run_id)
                self._check_room()
                self._follow(run_id, message.after, message)
            case Unsubscribe(run_id=run_id):
                await self._unfollow(run_id)
                self._send(Accepted(run_id=run_id, ref=message.ref))
            case Message():
                self._need("run")
                self._check_room()
                with telemetry.span("ws message", SpanKind.SERVER):
                    run_id = await self._agent.write(message, self.who)
                self._send(Accepted(run_id=run_id, ref=message.ref))
                # Messages that are answered together share a run.
                if run_id not in self._runs:
                    self._follow(run_id, 0, None)
            case Cancel(run_id=run_id):
                self._need("run")
                await self._agent.cancel(run_id, self.who)
                self._send(Accepted(run_id=run_id, ref=message.ref))
            case Ping():
                self._send(Pong(ref=message.ref))
            case _:
                assert_never(message)

    def _need(self, scope: str) -> None:
        if scope not in self.who.scopes:
            raise Forbidden(f"the scope {scope} is missing")

    def _check_room(self) -> None:
        if len(self._runs) >= MAX_RUNS:
            raise Conflict(f"a socket can follow at most {MAX_RUNS} runs: unsubscribe from one, or open another socket")

    def _follow(self, run_id: UUID, after: int, subscribe: Subscribe | None) -> None:
        task = self._start(self._catch_up(run_id, after, subscribe))
        self._runs[run_id] = task
        task.add_done_callback(partial(self._caught_up, run_id))

    def _caught_up(self, run_id: UUID, task: asyncio.Task[None]) -> None:
        # The socket may follow the run again by now, in another task.
        if self._runs.get(run_id) is task:
            del self._runs[run_id]

    async def _unfollow(self, run_id: UUID) -> None:
        match self._runs.pop(run_id, None):
            case asyncio.Task() as task:
                task.cancel()
                await asyncio.wait({task})
            case Feed() as feed:
                self._leave(feed)

    def _leave(self, feed: Feed) -> None:
        feed.leave(self)
        self._hub.release(feed)

    async def _catch_up(self, run_id: UUID, after: int, subscribe: Subscribe | None) -> None:
        """Sends the past events of a run, then joins its feed. `subscribe` is the message that needs an answer."""
        self._room = self._room or Room(self.on_slow)
        follow, read, ref = Follow(after), partial(self.read, run_id), subscribe.ref if subscribe else None
        with self._hub.listen(run_id, self._room) as live:
            try:
                facts = await read_until_available(read, follow.read_from)
                if not follow.is_known(facts):
                    raise InvalidMessage("after", "is not the id of an event of this run")
                if subscribe:
                    self._send(Accepted(run_id=run_id, ref=ref))
                if follow.has_end(facts):
                    return
                while not await self._join(run_id, follow, facts, live):
                    facts = await read_until_available(read, follow.last)
            except (NotFound, InvalidMessage) as error:
                self._refuse(error, ref)

    async def _join(self, run_id: UUID, follow: Follow, facts: list[Fact], live: Live) -> bool:
        """Sends the events of `facts` and of the live items. Returns False if facts are missing then."""
        feed = self._hub.feed(run_id)
        for fact in facts:
            await self._send_events(run_id, follow.fact(fact))
        while not follow.ended:
            match live.next_nowait():
                case Delta() as delta:
                    await self._send_events(run_id, follow.delta(delta))
                case Fact() as fact if not follow.misses(fact):
                    await self._send_events(run_id, follow.fact(fact))
                case None:
                    # Nothing is awaited from here on: no item can come between the queue and the feed.
                    if feed.join(self, follow, facts):
                        self._runs[run_id] = feed
                        return True
                    await feed.settled()
                    return False
                case Fact() | Missed():
                    return False
        return True

    async def _send_events(self, run_id: UUID, events: list[StreamEvent]) -> None:
        for event in events:
            await self.drained()
            self.write(event_frame(run_id, event))

    def _refuse(self, error: Exception, ref: str | None) -> None:
        if isinstance(error, AgentRefused):
            status, body = error.status, error.body
        else:
            response = problem(error)
            status, body = response.status_code, bytes(response.body)
            if status >= 500:
                _log.error("could not handle a client's message; the client gets an error", exc_info=error)
        said = msgspec.json.decode(body, type=_Problem)
        self._send(Error(status=status, detail=said.detail, errors=said.errors, ref=ref))

    def _send(self, message: ServerMessage) -> None:
        self.write(text_frame(_encoder.encode(message)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("socket failed; it is closed", exc_info=error)
            self.end(End.FAILED)
