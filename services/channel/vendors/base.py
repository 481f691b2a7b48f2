"""What every vendor's adapter is: verify and read what comes in, cut and send what goes out.

An adapter knows the vendor's wire and nothing of ours: no database, no lanes, no buses. Sources of each rule are the
vendor's own documents, named in its module.
"""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Generic, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing

C = TypeVar("C", bound=msgspec.Struct)

# How far a signed time may lie from ours, in either direction.
FRESH = timedelta(seconds=300)
# Where a vendor says "later" and not how much later.
DEFAULT_RETRY = timedelta(seconds=5)


class Request(NamedTuple):
    """A webhook as it came: names of `headers` in lower case, `query` undecoded, `body` untouched."""

    method: str
    query: str
    headers: Mapping[str, str]
    body: bytes


class Inbound(NamedTuple):
    """A person's message.

    ids: all names under which the vendor may bring it; known under one of them, it is a repeat.
    conversation: the vendor's id of the conversation, the thread included where there is one; `send` is given it back.
    person: the vendor's id of who wrote. message: the vendor's id of the message, for replies.
    """

    ids: tuple[str, ...]
    conversation: str
    person: str
    message: str
    text: str


class Ignored(NamedTuple):
    """Something genuine that starts no run. `reason` is shown to operators: what it was, never what it said."""

    ids: tuple[str, ...]
    reason: str


class Ack(NamedTuple):
    """The answer to a webhook, given once all of it is stored."""

    body: bytes = b""
    media_type: str = "text/plain"


class Received(NamedTuple):
    """What one webhook brought, in its order."""

    items: Sequence[Inbound | Ignored]
    ack: Ack = Ack()


class Outbound(NamedTuple):
    """One message to send. key: the same for each attempt at the same message; a UUID, and a number for a part."""

    key: str
    conversation: str
    text: str
    reply_to: str | None = None
    run_id: UUID | None = None


class Limit(NamedTuple):
    """At most `times` messages in `seconds` for whatever shares `scope` within the account."""

    scope: str
    times: int
    seconds: int


class AccountRefused(EffectFailed):
    """The vendor does not take this account any more, whatever is sent. Its reason tells it from other failures."""

    PREFIX: ClassVar[str] = "account refused: "

    def __init__(self, reason: str) -> None:
        super().__init__(self.PREFIX + reason)


class Vendor(ABC, Generic[C]):
    """One vendor. `name` is the channel type.

    origin: where its API lives; empty where the credentials say so, in those of its fields that `addresses` names.
    effect: ``keyed`` where the vendor takes our key and drops repeats, else ``once``.
    """

    name: ClassVar[str]
    credentials: ClassVar[type[msgspec.Struct]]
    origin: ClassVar[str]
    addresses: ClassVar[tuple[str, ...]]
    effect: ClassVar[Kind]

    @abstractmethod
    def receive(self, request: Request, credentials: C, now: datetime) -> Received:
        """Verifies the raw bytes and only then reads them.

        Raises Unauthenticated where it is not proven to come from the vendor, InvalidMessage where it is and still
        cannot be read.
        """

    @abstractmethod
    def split(self, text: str) -> Sequence[str]:
        """`text` in messages that the vendor takes."""

    @abstractmethod
    def limits(self, conversation: str) -> Sequence[Limit]:
        """How fast the vendor lets an account send to this conversation."""

    @abstractmethod
    async def send(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound) -> str | None:
        """Sends and returns the vendor's id of the message, None where it has none.

        Raises EffectFailed where it is refused for good (AccountRefused: so would be every other), Transient or
        RetryLater where it certainly was not sent and may be later, Unanswered where nobody knows.
        """


def same(given: str, expected: str) -> bool:
    """Whether two texts are equal, in a time that does not tell how far they are."""
    return hmac.compare_digest(given.encode(), expected.encode())


def fresh(timestamp: str, now: datetime) -> bool:
    """Whether `timestamp` (Unix seconds in decimal digits) lies within FRESH of `now`."""
    # More digits would be no time of today, and int() takes its time over many.
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        return False
    return abs(now.timestamp() - int(timestamp)) <= FRESH.total_seconds()


def refuse_passing(answer: Answer, asked_seconds: float | None = None) -> None:
    """Raises what the statuses mean that say nothing of the message itself: 429 and 5xx.

    `asked_seconds`: how long the body asks to wait; else the header Retry-After counts.
    """
    if answer.status == 504:
        # A gateway got no answer from behind it, where the message may have been taken.
        raise Unanswered("HTTP 504")
    if answer.status == 429 or answer.status == 503:
        asked = asked_seconds if asked_seconds is not None else _seconds(answer.headers.get("retry-after", ""))
        if asked is not None or answer.status == 429:
            raise RetryLater(DEFAULT_RETRY if asked is None else timedelta(seconds=asked), f"HTTP {answer.status}")
    if answer.status >= 500:
        raise Transient(f"HTTP {answer.status}")


def _seconds(text: str) -> float | None:
    return float(text) if text.isascii() and text.isdecimal() and len(text) <= 6 else None
