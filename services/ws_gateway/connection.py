"""One accepted WebSocket on its transport: reads the client's messages, writes frames (RFC 6455).

uvicorn makes the handshake, then hands the transport over. From then on a socket has no task and no queue: a frame that
many sockets need is built once and written to each transport.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from infra.web.http import MAX_BODY_BYTES
from infra.web.server import PING_SECONDS, PONG_SECONDS

# A client that does not read for this long is dropped.
SEND_SECONDS = 30.0
# The time for the client's side of the closing handshake.
CLOSE_SECONDS = 5.0
# Above this many unsent bytes, a client that has caught up with its runs is dropped. Catching up pauses much earlier.
MAX_UNSENT_BYTES = 256 * 1024
_PAUSE_BYTES = 64 * 1024
_PING = Frame(Opcode.PING, b"").serialize(mask=False)


def text_frame(text: bytes) -> bytes:
    """A text frame from a server; the same bytes for every client."""
    return Frame(Opcode.TEXT, text).serialize(mask=False)


class Connection(asyncio.Protocol):
    """The base of a socket. A subclass gets the client's messages by `on_message`."""

    __slots__ = (
        "_drained",
        "_heard_at",
        "_is_text",
        "_part",
        "_paused_at",
        "_ping_at",
        "_protocol",
        "_released",
        "is_open",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self) -> None:
        # The handshake is over, so the parser begins with frames. A larger message ends the socket with 1009.
        self._protocol = ServerProtocol(state=State.OPEN, max_size=MAX_BODY_BYTES)
        # The message that is being received. Joined at once: a client may send any number of empty fragments.
        self._part = bytearray()
        self._is_text = False
        self._drained: asyncio.Future[None] | None = None
        self._paused_at = 0.0
        self._released: Callable[[], object] = lambda: None
        self._heard_at = self._ping_at = time.monotonic()
        self.is_open = True

    def on_open(self) -> None:
        """The transport is there."""
        raise NotImplementedError

    def on_message(self, text: str | None) -> None:
        """A message of the client; None for a binary message."""
        raise NotImplementedError

    def on_slow(self) -> None:
        """The client reads too slowly."""
        raise NotImplementedError

    def on_unsent(self, size: int) -> None:
        """So many bytes wait for the client, who reads slowly. 0: few, or the connection has ended."""
        raise NotImplementedError

    def on_end(self) -> None:
        """The connection is being closed or was lost. Called once."""
        raise NotImplementedError

    def on_shutdown(self) -> None:
        """The server stops."""
        raise NotImplementedError

    @property
    def unread(self) -> int:
        """The bytes of a message of the client that is not complete."""
        return len(self._part) + len(self._protocol.reader.buffer)

    def take_over(self, transport: asyncio.Transport, released: Callable[[], object]) -> None:
        """Makes this the protocol of the transport. `released` is called when the connection has ended."""
        self.transport = transport
        self._released = released
        transport.set_write_buffer_limits(high=_PAUSE_BYTES)
        transport.set_protocol(self)
        self.on_open()

    def write(self, frame: bytes) -> None:
        """Writes a frame without waiting, if the connection is open. A client that is too far behind is dropped."""
        if not self.is_open:
            return
        self.transport.write(frame)
        if self._paused_at:
            unsent = self.transport.get_write_buffer_size()
            if unsent > MAX_UNSENT_BYTES:
                self.on_slow()
            self.on_unsent(unsent)

    async def drained(self) -> None:
        """Returns when few bytes wait for the client, or the connection has ended."""
        if self._paused_at and self.is_open:
            self._drained = self._drained or asyncio.get_running_loop().create_future()
            await asyncio.shield(self._drained)

    def close(self, code: int, reason: str) -> None:
        """Sends a close frame, and ends the connection soon after, with or without the client's answer."""
        if not self.is_open:
            return
        self._protocol.send_close(code, reason)
        self._flush()
        # A client that does not read, or does not answer, gets no proper end.
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.transport.abort)

    def tick(self, now: float) -> None:
        """Sends pings, and drops a client that is silent or does not read. Due every few seconds."""
        if not self.is_open:
            return
        if now - self._heard_at > PING_SECONDS + PONG_SECONDS:
            self.transport.abort()
        elif self._paused_at and now - self._paused_at > SEND_SECONDS:
            self.on_slow()
        elif now - self._ping_at > PING_SECONDS:
            self._ping_at = now
            self.transport.write(_PING)

    def data_received(self, data: bytes) -> None:
        self._heard_at = time.monotonic()
        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            # After the handshake the only events are frames.
            self._frame(cast(Frame, event))
        self._flush()

    def eof_received(self) -> None:
        self._protocol.receive_eof()
        self._flush()

    def pause_writing(self) -> None:
        self._paused_at = time.monotonic()

    def resume_writing(self) -> None:
        self._paused_at = 0.0
        self.on_unsent(0)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_unsent(0)
        self._released()
        self._end()

    def shutdown(self) -> None:
        """Called by uvicorn when the server stops."""
        self.on_shutdown()

    def _frame(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT) or not self.is_open:
            # The protocol has answered pings and close frames already.
            return
        if frame.opcode is not Opcode.CONT:
            self._is_text = frame.opcode is Opcode.TEXT
        self._part += frame.data
        if not frame.fin:
            return
        whole, self._part = self._part, bytearray()
        text = None
        if self._is_text:
            try:
                text = whole.decode()
            except UnicodeDecodeError:
                self._protocol.fail(1007, "text must be valid UTF-8")
                return
        self.on_message(text)

    def _flush(self) -> None:
        """Sends the protocol's own frames: answers to pings, and close frames."""
        for data in self._protocol.data_to_send():
            if data:
                self.transport.write(data)
                if self._paused_at and self.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
                    # It sends pings and does not read the answers. It would not read a close frame either.
                    self.transport.abort()
            else:
                self.transport.close()
        if self._protocol.state is not State.OPEN:
            self._end()

    def _end(self) -> None:
        if self.is_open:
            self.is_open = False
            self._wake()
            self.on_end()

    def _wake(self) -> None:
        if self._drained and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None
