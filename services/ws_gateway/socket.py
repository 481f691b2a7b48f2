"""The WebSocket: one client follows many runs, and writes to agents. What is said is in `protocol`."""

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
from services.ws_gateway.telling import SEND_SECONDS, happenings, persistently

MAX_RUNS = 1_000
# An identity lasts a minute, a socket may last for days.
CHECK_SECONDS = 60.0
# While nobody says whether it may, a client stays no longer than this.
UNCHECKED_SECONDS = 300.0

# How a socket is closed (RFC 6455 §7.4.1, the registry there); 4401 is ours, after HTTP's 401.
FAILED = 1011, "an error inside this service"
RESTARTING = 1012, "the service restarts: come again"
TOO_SLOW = 1013, "you do not keep up: come again"
UNCHECKED = 1013, "whether you may stay cannot be told now: come again"
NOT_ALLOWED = 4401, "the API key was revoked or has expired"

_log = get_logger("ws_gateway.socket")
_FROM_CLIENT = cast("type[ClientMessage]", ClientMessage)
_encoder = msgspec.json.Encoder()


class _Problem(msgspec.Struct):
    detail: str
    errors: list[FieldError] = []


class Socket:
    """A client's WebSocket from its acceptance to its end. `who`: who it is by what came with the handshake; that is
    asked again every minute.

    Messages are taken one after the other: the next when the one before was answered, `subscribe` excepted, whose
    answer comes when its run is found.
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
        # How to close it; None: it is closed already.
        self._over: asyncio.Future[tuple[int, str] | None] = asyncio.get_running_loop().create_future()

    async def serve(self) -> None:
        await self._websocket.accept()
        self._start(self._hear())
        self._start(self._watch())
        try:
            how = await self._over
        finally:
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if how:
            # One that takes nothing is left without a proper end.
            with suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
                async with asyncio.timeout(1):
                    await self._websocket.close(*how)

    async def _hear(self) -> None:
        while (message := await self._websocket.receive())["type"] == "websocket.receive":
            await self._answer(message.get("text"))
        self._end(None)

    async def _watch(self) -> None:
        """Until the process is to end, or the client may not stay."""
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
                    _log.warning("a client's key cannot be checked, its socket is closed", error=str(error))
                    self._end(UNCHECKED)
                    return
                continue
            if not scopes:
                _log.info("a client may not stay", actor=self._who.actor)
                self._end(NOT_ALLOWED)
                return
            self._who = replace(self._who, scopes=scopes)
            checked = time.monotonic()

    async def _answer(self, text: str | None) -> None:
        asked: ClientMessage | None = None
        try:
            if text is None:
                raise WrongType("body", "binary; this takes JSON as text")
            asked = decode_json(text.encode(), _FROM_CLIENT)
            await self._do(asked)
        except WebSocketDisconnect:
            # The client's, not the message's.
            raise
        except Exception as error:
            await self._refuse(error, asked.ref if asked else ref_of(text or ""))

    async def _do(self, asked: ClientMessage) -> None:
        match asked:
            case Subscribe(run_id=run_id):
                self._need("read")
                await self._forget(run_id)
                self._check_room()
                self._runs[run_id] = self._start(self._tell(run_id, asked.after, asked))
            case Unsubscribe(run_id=run_id):
                await self._forget(run_id)
                await self._put(Accepted(run_id=run_id, ref=asked.ref))
            case Message():
                self._need("run")
                self._check_room()
                with telemetry.span("ws message", SpanKind.SERVER):
                    run_id = await self._agent.write(asked, self._who)
                await self._put(Accepted(run_id=run_id, ref=asked.ref))
                # Messages that are answered together share a run.
                if run_id not in self._runs:
                    self._runs[run_id] = self._start(self._tell(run_id, 0, None))
            case Cancel(run_id=run_id):
                self._need("run")
                await self._agent.cancel(run_id, self._who)
                await self._put(Accepted(run_id=run_id, ref=asked.ref))
            case Ping():
                await self._put(Pong(ref=asked.ref))
            case _:
                assert_never(asked)

    def _need(self, scope: str) -> None:
        if scope not in self._who.scopes:
            raise Forbidden(f"the scope {scope} is missing")

    def _check_room(self) -> None:
        if len(self._runs) >= MAX_RUNS:
            raise Conflict(f"a socket follows {MAX_RUNS} runs at most: unsubscribe from one, or open another")

    async def _tell(self, run_id: UUID, after: int, asked: Subscribe | None) -> None:
        """Follows a run to its end; `asked`: what is still to be answered."""
        async with self._hub.listen(run_id, self._client) as live:
            follow, read = Follow(after), partial(self._read, run_id)
            try:
                facts = await persistently(read, follow.read_from)
                if not follow.is_known(facts):
                    raise InvalidMessage("after", "is none that this run's events had")
                if asked:
                    await self._put(Accepted(run_id=run_id, ref=asked.ref))
                if not follow.has_end(facts):
                    async with aclosing(happenings(read, live, follow, facts)) as happening:
                        async for events in happening:
                            await self._put_events(run_id, events)
            except (NotFound, InvalidMessage) as error:
                await self._refuse(error, asked.ref if asked else None)

    async def _read(self, run_id: UUID, after: int) -> list[Fact]:
        return await self._agent.facts(run_id, after, self._who)

    async def _put_events(self, run_id: UUID, events: list[Event]) -> None:
        for event in events:
            await self._put(RunEvent(run_id=run_id, event=event.name, id=event.id, data=event.data))

    async def _refuse(self, error: Exception, ref: str | None) -> None:
        if isinstance(error, Refused):
            status, body = error.status, error.body
        else:
            response = problem(error)
            status, body = response.status_code, bytes(response.body)
            if status >= 500:
                _log.error("a message could not be answered", exc_info=error)
        said = msgspec.json.decode(body, type=_Problem)
        await self._put(Error(status=status, detail=said.detail, errors=said.errors, ref=ref))

    async def _put(self, message: ServerMessage) -> None:
        """Raises WebSocketDisconnect where the client is gone. One that takes nothing is dropped."""
        text = _encoder.encode(message).decode()
        late = asyncio.get_running_loop().call_later(SEND_SECONDS, self._drop)
        try:
            await self._websocket.send_text(text)
        except RuntimeError as error:
            # What uvicorn and Starlette say where the socket is being closed already.
            raise WebSocketDisconnect(1006) from error
        finally:
            late.cancel()

    def _drop(self) -> None:
        _log.info("a client that takes nothing is dropped")
        self._end(TOO_SLOW)

    async def _forget(self, run_id: UUID) -> None:
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
                _log.error("a socket failed", exc_info=error)
                self._end(FAILED)

    def _end(self, how: tuple[int, str] | None) -> None:
        if not self._over.done():
            self._over.set_result(how)
