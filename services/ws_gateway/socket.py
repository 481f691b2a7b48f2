"""The WebSocket: one client follows many runs and sends messages to agents. `protocol` has the messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, assert_never, cast
from uuid import UUID

import msgspec
from opentelemetry.trace import SpanKind
from starlette.websockets import WebSocket, WebSocketDisconnect

from infra.errors import Conflict, Forbidden, InvalidMessage, NotFound, Transient, WrongType
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.security.auth import Identity
from infra.web.http import decode_json
from infra.web.problems import problem
from services.ws_gateway.agent import Agent, Refused
from services.ws_gateway.domain import Event, Fact, Follow
from services.ws_gateway.hub import Client, Hub
from services.ws_gateway.keys import Keys
from services.ws_gateway.protocol import (
    Accepted,
    Cancel,
    ClientMessage,
    Error,
    FieldError,
    Message,
    Ping,
    Pong,
    RunEvent,
    ServerMessage,
    Subscribe,
    Unsubscribe,
    ref_of,
)
from services.ws_gateway.run_events import SEND_SECONDS, read_until_available, run_events

MAX_RUNS = 1_000
# An identity is valid for a minute, but a socket may last for days. So its key is checked this often.
CHECK_SECONDS = 60.0
# A socket is closed if its key could not be checked for this long.
UNCHECKED_SECONDS = 300.0

# The close codes (RFC 6455 §7.4.1 and its registry). 4401 is our own, after HTTP's 401.
FAILED = 1011, "internal error"
RESTARTING = 1012, "the service restarts: connect again"
TOO_SLOW = 1013, "the client does not keep up: connect again"
UNCHECKED = 1013, "the API key cannot be checked now: connect again"
NOT_ALLOWED = 4401, "the API key was revoked or has expired"

_log = get_logger("ws_gateway.socket")
_FROM_CLIENT = cast("type[ClientMessage]", ClientMessage)
_encoder = msgspec.json.Encoder()


class _Problem(msgspec.Struct):
    detail: str
    errors: list[FieldError] = []


class Socket:
    """A client's WebSocket from the handshake to its end. `who` is the identity of the handshake; its scopes are
    checked again every minute.

    Messages are handled in order: the next one after the answer to the one before. Only `subscribe` is answered later,
    when its run was read.
    """

    def __init__(self, hub: Hub, agent: Agent, keys: Keys, who: Identity, websocket: WebSocket) -> None:
        self._hub = hub
        self._agent = agent
        self._keys = keys
        self._who = who
        self._websocket = websocket
        self._client = Client()
        self._client.end = lambda: self._end(RESTARTING if hub.stopping.is_set() else TOO_SLOW)
        self._tasks: set[asyncio.Task[None]] = set()
        self._runs: dict[UUID, asyncio.Task[None]] = {}
        # The close code and reason; None if the connection is closed already.
        self._over: asyncio.Future[tuple[int, str] | None] = asyncio.get_running_loop().create_future()

    async def serve(self) -> None:
        await self._websocket.accept()
        self._start(self._receive())
        self._start(self._check_key())
        try:
            how = await self._over
        finally:
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if how:
            # A client that does not read does not get a proper end.
            with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
                async with asyncio.timeout(1):
                    await self._websocket.close(*how)

    async def _receive(self) -> None:
        while (message := await self._websocket.receive())["type"] == "websocket.receive":
            await self._answer(message.get("text"))
        self._end(None)

    async def _check_key(self) -> None:
        """Returns when the process ends or the key is not valid any more."""
        checked = time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._hub.stopping.wait()
                self._end(RESTARTING)
                return
            try:
                scopes = await self._keys.scopes(self._who)
            except Transient as error:
                if time.monotonic() - checked > UNCHECKED_SECONDS:
                    _log.warning("could not check a client's key; its socket is closed", error=str(error))
                    self._end(UNCHECKED)
                    return
                continue
            if not scopes:
                _log.info("API key was revoked or has expired; its socket is closed", actor=self._who.actor)
                self._end(NOT_ALLOWED)
                return
            self._who = replace(self._who, scopes=scopes)
            checked = time.monotonic()

    async def _answer(self, text: str | None) -> None:
        asked: ClientMessage | None = None
        try:
            if text is None:
                raise WrongType("body", "must be a text frame with JSON, not a binary frame")
            asked = decode_json(text.encode(), _FROM_CLIENT)
            await self._do(asked)
        except WebSocketDisconnect:
            # The connection has ended, so the message needs no answer.
            raise
        except Exception as error:
            await self._refuse(error, asked.ref if asked else ref_of(text or ""))

    async def _do(self, asked: ClientMessage) -> None:
        match asked:
            case Subscribe(run_id=run_id):
                self._need("read")
                await self._unfollow(run_id)
                self._check_room()
                self._runs[run_id] = self._start(self._follow(run_id, asked.after, asked))
            case Unsubscribe(run_id=run_id):
                await self._unfollow(run_id)
                await self._send(Accepted(run_id=run_id, ref=asked.ref))
            case Message():
                self._need("run")
                self._check_room()
                with telemetry.span("ws message", SpanKind.SERVER):
                    run_id = await self._agent.write(asked, self._who)
                await self._send(Accepted(run_id=run_id, ref=asked.ref))
                # Messages that are answered together share a run.
                if run_id not in self._runs:
                    self._runs[run_id] = self._start(self._follow(run_id, 0, None))
            case Cancel(run_id=run_id):
                self._need("run")
                await self._agent.cancel(run_id, self._who)
                await self._send(Accepted(run_id=run_id, ref=asked.ref))
            case Ping():
                await self._send(Pong(ref=asked.ref))
            case _:
                assert_never(asked)

    def _need(self, scope: str) -> None:
        if scope not in self._who.scopes:
            raise Forbidden(f"the scope {scope} is missing")

    def _check_room(self) -> None:
        if len(self._runs) >= MAX_RUNS:
            raise Conflict(f"a socket can follow at most {MAX_RUNS} runs: unsubscribe from one, or open another socket")

    async def _follow(self, run_id: UUID, after: int, asked: Subscribe | None) -> None:
        """Sends the events of a run until its end. `asked` is the subscription that still needs its answer."""
        async with self._hub.listen(run_id, self._client) as live:
            follow, read = Follow(after), partial(self._read, run_id)
            try:
                facts = await read_until_available(read, follow.read_from)
                if not follow.is_known(facts):
                    raise InvalidMessage("after", "is not the id of an event of this run")
                if asked:
                    await self._send(Accepted(run_id=run_id, ref=asked.ref))
                if not follow.has_end(facts):
                    async with aclosing(run_events(read, live, follow, facts)) as batches:
                        async for events in batches:
                            await self._send_events(run_id, events)
            except (NotFound, InvalidMessage) as error:
                await self._refuse(error, asked.ref if asked else None)

    async def _read(self, run_id: UUID, after: int) -> list[Fact]:
        return await self._agent.facts(run_id, after, self._who)

    async def _send_events(self, run_id: UUID, events: list[Event]) -> None:
        for event in events:
            await self._send(RunEvent(run_id=run_id, event=event.name, id=event.id, data=event.data))

    async def _refuse(self, error: Exception, ref: str | None) -> None:
        if isinstance(error, Refused):
            status, body = error.status, error.body
        else:
            response = problem(error)
            status, body = response.status_code, bytes(response.body)
            if status >= 500:
                _log.error("could not handle a client's message; the client gets an error", exc_info=error)
        said = msgspec.json.decode(body, type=_Problem)
        await self._send(Error(status=status, detail=said.detail, errors=said.errors, ref=ref))

    async def _send(self, message: ServerMessage) -> None:
        """Raises WebSocketDisconnect if the client is gone. A client that does not read is dropped."""
        text = _encoder.encode(message).decode()
        late = asyncio.get_running_loop().call_later(SEND_SECONDS, self._drop)
        try:
            await self._websocket.send_text(text)
        except RuntimeError as error:
            # uvicorn and Starlette raise RuntimeError if the socket is being closed.
            raise WebSocketDisconnect(1006) from error
        finally:
            late.cancel()

    def _drop(self) -> None:
        _log.info("client does not read its socket; the connection is dropped")
        self._end(TOO_SLOW)

    async def _unfollow(self, run_id: UUID) -> None:
        if task := self._runs.pop(run_id, None):
            task.cancel()
            await asyncio.wait({task})

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        for run_id in [run_id for run_id, found in self._runs.items() if found is task]:
            del self._runs[run_id]
        match None if task.cancelled() else task.exception():
            case None:
                pass
            case WebSocketDisconnect():
                self._end(None)
            case error:
                _log.error("socket failed; it is closed", exc_info=error)
                self._end(FAILED)

    def _end(self, how: tuple[int, str] | None) -> None:
        if not self._over.done():
            self._over.set_result(how)
