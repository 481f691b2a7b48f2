"""The HTTP server behind every fake. It uses sockets directly, because a framework cannot cut its own answer off."""

from __future__ import annotations

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec


class Call(NamedTuple):
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class Accepted(NamedTuple):
    """A message that the vendor accepted."""

    to: str
    """The conversation, with its thread."""
    text: str
    """The text as a person sees it."""
    id: str
    fields: Mapping[str, Any]
    """The whole request."""
    at: float
    """Unix seconds."""


def encoded(content: object) -> bytes:
    """JSON. Half of a character, which UTF-8 refuses, is escaped, as vendors do."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:
        return json.dumps(content).encode()


class FormFile(NamedTuple):
    """A file in a form."""

    name: str
    content_type: str
    content: bytes


def read_form(call: Call) -> tuple[dict[str, str], dict[str, FormFile]]:
    """The texts and the files of a multipart form, by their fields."""
    head = f"content-type: {call.headers.get('content-type', '')}\r\n\r\n".encode()
    texts: dict[str, str] = {}
    files: dict[str, FormFile] = {}
    form = BytesParser(EmailMessage, policy=HTTP).parsebytes(head + call.body)
    for part in form.iter_parts():
        field = str(part.get_param("name", header="content-disposition"))
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        if name := part.get_filename():
            files[field] = FormFile(name, part.get_content_type(), content)
        else:
            texts[field] = content.decode()
    return texts, files


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Mapping[str, str] = {}


class Fault(NamedTuple):
    """A fault that one request meets."""

    reply: Reply | None = None
    """The answer; None cuts the connection."""
    accept: bool = False
    """The message is accepted first, but the sender does not get the confirmation."""
    wait: asyncio.Event | None = None
    """The answer waits for this event."""
    late: bool = False
    """After the wait the request is handled normally."""


class Refused(Exception):
    """The vendor refuses this request. `reply` is the vendor's answer."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


def answer(status: int, body: Any = None, **headers: str) -> Fault:
    """Answers with this status and accepts nothing. `headers`: ``retry_after="2"`` is ``Retry-After: 2``."""
    return Fault(Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()}))


def cut(*, accept: bool) -> Fault:
    """Closes the connection without an answer."""
    return Fault(accept=accept)


def hang(*, accept: bool) -> Fault:
    """Sends no answer and keeps the connection open until the fake is closed."""
    return Fault(accept=accept, wait=asyncio.Event())


def hold(until: asyncio.Event) -> Fault:
    """Waits for the event, then handles the request normally."""
    return Fault(wait=until, late=True)


class StandIn(ABC):
    """One vendor account. ``async with`` serves it at `url`, a free port of the loopback interface."""

    def __init__(self) -> None:
        self.ledger: list[Accepted] = []
        """The accepted messages, in order."""
        self.edits: list[tuple[str, str]] = []
        """The id and the new text of each edit, in order. The ledger has the last text of each message."""
        self.drafts: list[tuple[str, str]] = []
        """The conversation and the text of each draft, in order."""
        self.signs: list[str] = []
        """The conversations, or the messages, in which the account was shown as typing."""
        self.refusals: list[str] = []
        """The refused requests and the reasons. A correct client causes only those that a test provokes."""
        self.faults: deque[Fault] = deque()
        """The faults of the next requests, one for each."""
        self.files: dict[str, bytes] = {}
        """The contents of files, by the vendor's id or by the path of their address."""
        self.webhook = ""
        """The address that the account was told to call."""
        self.calls = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @abstractmethod
    def handle(self, call: Call) -> Reply:
        """Handles one request and records an accepted message. Raises Refused."""

    def file(self, ref: str) -> Reply:
        """The answer with the content of a file."""
        if ref not in self.files:
            raise Refused(Reply(404, {"error": "no such file"}))
        return Reply(200, self.files[ref])

    def record(self, to: str, text: str, id_: str, fields: Mapping[str, Any]) -> None:
        self.ledger.append(Accepted(to, text, id_, fields, time.time()))

    def change(self, id_: str, text: str) -> bool:
        """Changes the text of an accepted message. False if there is none with this id."""
        for n, message in enumerate(self.ledger):
            if message.id == id_:
                self.ledger[n] = message._replace(text=text)
                self.edits.append((id_, text))
                return True
        return False

    def withdraw(self, id_: str) -> bool:
        """Deletes an accepted message. False if there is none with this id."""
        before = len(self.ledger)
        self.ledger = [message for message in self.ledger if message.id != id_]
        return len(self.ledger) < before

    def texts(self, to: str | None = None) -> list[str]:
        """The texts that a person would see, in order; of one conversation, or of all."""
        return [message.text for message in self.ledger if to in (None, message.to)]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def start(self, port: int = 0) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, limit=2**21)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Closes all connections, hanging ones included."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (call := await _read(reader)) and (reply := await self._respond(call)):
                writer.write(_bytes(reply))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client has disconnected, or this server is closing.
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _respond(self, call: Call) -> Reply | None:
        """The answer; None cuts the connection."""
        self.calls += 1
        fault = self.faults.popleft() if self.faults else Fault(late=True)
        if fault.accept:
            self._handle_or_refuse(call)
        if fault.wait:
            await fault.wait.wait()
        return self._handle_or_refuse(call) if fault.late else fault.reply

    def _handle_or_refuse(self, call: Call) -> Reply:
        try:
            return self.handle(call)
        except Refused as refused:
            self.refusals.append(f"{refused.reply.status} {refused.reply.body}")
            return refused.reply


async def _read(reader: asyncio.StreamReader) -> Call | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    return Call(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


def _bytes(reply: Reply) -> bytes:
    body = b"" if reply.body is None else reply.body
    if not isinstance(body, bytes):
        body = msgspec.json.encode(body)
    head = f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
    return head.encode() + b"content-type: application/json\r\n\r\n" + body
