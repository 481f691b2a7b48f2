"""The interface of a vendor adapter: it verifies and parses webhooks, and splits and sends messages.

An adapter knows the vendor's protocol and nothing of ours: no database, no lanes, no buses. The source of each rule is
the vendor's documentation, which the adapter's module names.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, overload
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, InvalidMessage, RetryLater, TooLarge, Transient, Unanswered
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from infra.outgoing.retry_after import delay, retry_after
from infra.recent import Recent
from infra.web.http import MAX_BODY_BYTES
from protos.messages.channel import FORWARDED, IN_REPLY
from services.channel.vendors.items import Ignored, Item, Received

C = TypeVar("C", bound=msgspec.Struct)
T = TypeVar("T")

# The largest accepted difference between a signed time and our clock, in either direction.
MAX_CLOCK_DIFFERENCE = timedelta(seconds=300)
Preview = Literal["edit", "draft"]
Groups = Literal["all", "mentions", "replies"]
"""Which messages of a group start a run: all; those that mention the bot or reply to it; only replies to it."""
PLACEHOLDER = "…"
"""In place of an answer that follows. A process that dies before it knows the message's id leaves this behind."""
# The delay if a vendor asks us to retry later but names no delay.
DEFAULT_RETRY = timedelta(seconds=5)
# Access tokens of accounts. A forgotten one is fetched again.
KEPT_TOKENS = 4_096
# Of one call. WhatsApp sends at most 1,000 messages, each perhaps in a change and an entry of its own.
MAX_PARTS = 4_000
MAX_FILE = 8 * 1024 * 1024
"""Bytes of a file to send. Each vendor that takes files of all types takes at least this."""


class Request(NamedTuple):
    """A webhook call as it arrived."""

    method: str
    query: str
    """Not decoded."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes
    """The raw bytes."""
    url: str = ""
    """The public URL that the vendor called, with its query. Some vendors sign it."""
    keys: Mapping[str, Any] = {}
    """The answer of `Vendor.keys`."""
    identity: str = ""
    """The account's name at the vendor, as `identify` last returned it; empty: not known."""


class OutboundFile(NamedTuple):
    """A file to send. The sender adds the content, and the type by the content, before the vendor gets it."""

    url: str
    """Empty if the file lies in our store, which the vendor cannot reach."""
    name: str
    content_type: str = ""
    content: bytes = b""
    path: str = ""
    """In our store; empty if there is an address."""


class Outbound(NamedTuple):
    """One message to send."""

    key: str
    """The idempotency key, the same for each attempt: the delivery's UUID, with ``-<n>`` for part n of several."""
    conversation: str
    text: str
    reply_to: str | None = None
    """The vendor's id of the message that this part quotes. Only the first part has one."""
    run_id: UUID | None = None
    answers: str | None = None
    """The vendor's id of the message that the delivery answers, the same for each part."""
    part: int = 1
    """The number of this part, from 1."""
    is_last: bool = False
    """The delivery has no part after this one."""
    file: OutboundFile | None = None
    """This part is a file. `text` is its link."""
    webhook: str = ""
    """The public URL of the channel's webhook, if `receipts_asked`."""
    is_late: bool = False
    """It is more than a day since the person wrote, or they never did."""
    follows_up: bool = False
    """It is sent by the rights of the person's message instead of those of the account; see `Vendor.otherwise`."""


class Limit(NamedTuple):
    """At most `times` messages in `seconds`, counted over all sends of the account with the same `scope`."""

    scope: str
    times: int
    seconds: int


class UnreadableCall(Exception):
    """A genuine call whose JSON does not have the documented shape. It is answered 200: vendors repeat an event that is
    refused, and switch off the webhook in the end."""


class AccountRefused(EffectFailed):
    """The vendor refuses the account, so every other message would fail too. The prefix of the reason marks it."""

    PREFIX: ClassVar[str] = "account refused: "

    def __init__(self, reason: str) -> None:
        super().__init__(self.PREFIX + reason)


class Vendor(ABC, Generic[C]):
    """One vendor."""

    name: ClassVar[str]
    """The channel type."""
    credentials: ClassVar[type[msgspec.Struct]]
    kinds: ClassVar[Mapping[str, str]]
    """The kinds of messages and events that the vendor documents. Empty: it is read; else why it is ignored."""
    origin: ClassVar[str]
    """The origin of the vendor's API; empty if the credentials contain the address."""
    addresses: ClassVar[tuple[str, ...]]
    """The fields of the credentials that are addresses."""
    effect: ClassVar[Kind]
    """``keyed`` if the vendor accepts our key and drops repeats, else ``once``."""
    key_known: ClassVar[timedelta | None] = None
    """How long the vendor knows the key, less the time of a call. None: for as long as a delivery is tried."""
    max_body: ClassVar[int] = MAX_BODY_BYTES
    """The largest webhook body that the vendor sends, in bytes."""
    groups: ClassVar[tuple[Groups, ...]] = ("all",)
    """The choices of a channel: the vendor tells mentions, and replies to the bot, or not."""
    files: ClassVar[Mapping[str, int]] = {}
    """The largest file in bytes that `send` takes, by its MIME type; of all other types under the empty name. Any other
    file is sent as a link."""
    files_by_address: ClassVar[bool] = False
    """The vendor fetches files itself, so it gets none of our store."""
    receipts_asked: ClassVar[bool] = False
    """The vendor sends receipts to the address that a message names."""
    preview: ClassVar[Preview | None] = None
    """How a person sees an answer while it is written. ``edit``: a message that is edited until it is the answer.
    ``draft``: a text that the vendor takes away by itself. None: not at all."""
    preview_seconds: ClassVar[int] = 1
    """The pause between two texts of a preview, so that a conversation stays within the vendor's rate."""
    sign_seconds: ClassVar[int] = 0
    """How long the vendor shows that the bot is typing; 0: it does not."""

    def needs_keys(self, body: bytes) -> bool:
        """True if `keys` must be asked before `receive`."""
        return False

    async def keys(self, outgoing: Outgoing, origin: str, credentials: C, request: Request) -> Mapping[str, Any]:
        """The vendor's published keys, with which `receive` verifies this call. Raises Transient if they cannot be read
        now."""
        return {}

    def needs_identity(self, body: bytes) -> bool:
        """True if `receive` reads `Request.identity`."""
        return False

    @abstractmethod
    def receive(self, request: Request, credentials: C, now: datetime) -> Received:
        """Verifies the raw bytes first, then parses them.

        Raises Unauthenticated if the call is not proven to come from the vendor, InvalidMessage if it is proven but
        malformed, UnreadableCall if it is JSON of an unexpected shape, TooLarge if it has more than MAX_PARTS parts.
        """

    @abstractmethod
    def split(self, text: str) -> Sequence[str]:
        """Splits `text` into messages that the vendor accepts."""

    @abstractmethod
    def limits(self, conversation: str) -> Sequence[Limit]:
        """The vendor's rate limits that apply to a message to this conversation."""

    steps: ClassVar[tuple[str, ...]] = ()
    """How a tenant connects an account, in the order of the steps."""

    def effect_of(self, message: Outbound) -> Kind:
        """The kind of effect of sending this part, if a vendor has several ways of sending."""
        return self.effect

    @abstractmethod
    async def identify(self, outgoing: Outgoing, origin: str, credentials: C) -> str:
        """Makes a call with the credentials that changes nothing, and returns the account's name at the vendor.

        Raises as `send` does.
        """

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: C, ref: str, most: int) -> bytes:
        """The content of an attachment, by its `ref`; of at most `most` bytes.

        Raises as `send` does, and TooLarge.
        """
        raise EffectFailed("this type of channel does not give its files")

    async def register(self, outgoing: Outgoing, origin: str, credentials: C, url: str) -> bool:
        """Tells the vendor to call `url`. False if the vendor has no call for that: a person enters it in its console.

        Raises as `send` does.
        """
        return False

    @abstractmethod
    async def send(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound) -> str | None:
        """Sends one message and returns the vendor's id of it, or None if the vendor gives none.

        Raises EffectFailed if the vendor refuses it permanently (AccountRefused: it refuses the whole account),
        Transient or RetryLater if it certainly was not sent and may be sent later, Unanswered if the outcome is
        unknown.
        """

    def otherwise(self, message: Outbound, reason: str) -> Outbound | None:
        """The message as it is sent after the vendor refused it for this reason, with a key of its own. None: not."""
        return None

    def takes_late(self, credentials: C, reason: str) -> bool:
        """True if a receipt with this reason refuses a message as too late, and the account can send it with
        `is_late`."""
        return False

    async def show_typing(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound) -> None:
        """Shows that the bot is typing, if `sign_seconds` is not 0. Raises as `send` does."""
        raise EffectFailed("this type of channel does not show it")

    async def draft(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound) -> None:
        """Shows the text so far, if `preview` is ``draft``. Raises as `send` does."""
        raise EffectFailed("this type of channel has no drafts")

    async def place(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound) -> str | None:
        """Sends a sign in place of the text, and returns the id of the message for `edit`, if `preview` is
        ``edit``. Raises as `send` does."""
        return await self.send(outgoing, origin, credentials, message._replace(text=PLACEHOLDER))

    async def edit(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound, shown: str) -> None:
        """Replaces the text of the message `shown`. Raises as `send` does; EffectFailed also if the message is gone."""
        raise EffectFailed("this type of channel does not edit messages")

    async def retract(self, outgoing: Outgoing, origin: str, credentials: C, message: Outbound, shown: str) -> None:
        """Deletes the message `shown`. Raises as `send` does."""
        raise EffectFailed("this type of channel does not delete messages")


class Tokens:
    """Access tokens of this process, by the credentials that they were fetched for."""

    def __init__(self) -> None:
        self._tokens: Recent[object, tuple[float, str]] = Recent(KEPT_TOKENS)
        self._locks: Recent[object, asyncio.Lock] = Recent(KEPT_TOKENS)

    async def get(self, account: object, fetch: Callable[[], Awaitable[tuple[str, float]]]) -> str:
        """The token of the account. `fetch` returns a new one and the seconds that it is valid; one call at a time."""
        async with self._locks.setdefault(account, asyncio.Lock()):
            until, token = self._tokens.get(account, (0.0, ""))
            if until < time.monotonic():
                token, seconds = await fetch()
                # It is replaced a little early, so that it does not run out on its way.
                self._tokens[account] = time.monotonic() + seconds * 0.9, token
            return token

    def drop(self, account: object, token: str) -> None:
        """Forgets a token that the vendor refused, unless it was replaced already."""
        if self._tokens.get(account, (0.0, ""))[1] == token:
            del self._tokens[account]


# In JSON: an escaped character beyond 16 bits; half of such a one, escaped or as the bytes of UTF-8; another escape.
_ESCAPED = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\xed[\xa0-\xbf][\x80-\xbf])|\\."
)
# The errors of an answer that is not in the vendor's shape, or nested deeper than Python can follow.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def mended(body: bytes) -> bytes:
    """JSON with U+FFFD in place of halves of characters.

    Programs cut texts in the middle of an emoji, and vendors pass that on, in any field.
    """
    return _ESCAPED.sub(lambda found: rb"\ufffd" if found[1] else found[0], body)


@overload
def from_json(body: bytes | str | msgspec.Raw) -> Any: ...


@overload
def from_json(body: bytes | str | msgspec.Raw, type_: type[T]) -> T: ...


def from_json(body: bytes | str | msgspec.Raw, type_: Any = Any) -> Any:
    """JSON as `type_`, `mended` if it has to be. A field that may be missing may be null.

    Raises the errors of MALFORMED.
    """
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        try:
            given = msgspec.json.encode(_without_nulls(from_json(body)))
        except MALFORMED:
            raise error from None
        return msgspec.json.decode(given, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(mended(body.encode() if isinstance(body, str) else bytes(body)), type=type_)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(field) for name, field in value.items() if field is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def read_json(answer: Answer, type_: type[T]) -> T:
    """The vendor's answer to a send. Raises as `raise_for_transient`, and Unanswered if a good answer is malformed."""
    raise_for_transient(answer)
    try:
        return from_json(answer.body, type_)
    except MALFORMED as error:
        if answer.status == 401:
            raise AccountRefused("HTTP 401") from error
        if answer.status >= 400:
            raise EffectFailed(f"HTTP {answer.status}") from error
        raise Unanswered(f"HTTP {answer.status} with a malformed body") from error


def decode(body: bytes | msgspec.Raw, type_: type[T]) -> T:
    """JSON of a vendor as `type_`. Raises InvalidMessage if it is not JSON, UnreadableCall if it has another shape."""
    try:
        return from_json(body, type_)
    except msgspec.ValidationError as error:
        raise UnreadableCall(str(error)) from error
    except MALFORMED as error:
        raise InvalidMessage("body", str(error)) from error


class Batch:
    """Reads the parts of one call, and parts within parts, and counts them all before they are read."""

    def __init__(self) -> None:
        self._parts = 0

    def counted(self, parts: Sequence[T]) -> Sequence[T]:
        """Raises TooLarge if the call has more than MAX_PARTS now."""
        self._parts += len(parts)
        if self._parts > MAX_PARTS:
            raise TooLarge(f"body: must have at most {MAX_PARTS} events, with the parts that hold them")
        return parts

    def of_each(self, parts: Sequence[msgspec.Raw], read: Callable[[msgspec.Raw], Iterable[Item]]) -> Iterator[Item]:
        """The items of all parts. A part of an unexpected shape is ignored, and the others count."""
        for part in self.counted(parts):
            try:
                yield from read(part)
            except UnreadableCall as error:
                digest = hashlib.sha256(bytes(part)).hexdigest()
                yield Ignored((f"part/{digest}",), f"unexpected shape: {error}"[:200])


def placeholder(kind: str, *names: str) -> str:
    """The text of a message that has none, so that the agent can say that it cannot read the attachment."""
    named = ", ".join(filter(None, names))
    return f"[The person sent {kind}{f' ({named})' if named else ''} without text. Its content cannot be read here.]"


def described(kind: str, *facts: object) -> str:
    """The text for a message without text, such as ``[Location: Main Street 1, 52.5, 13.4]``."""
    known = ", ".join(str(fact) for fact in facts if fact not in (None, ""))
    return f"[{kind}: {known}]" if known else f"[{kind}]"


def forwarded(words: str, before: str = "") -> str:
    """The text of a message that forwards another one's `words`, perhaps after some of its author."""
    return f"{before}\n\n{FORWARDED}\n{words}" if before else f"{FORWARDED}\n{words}"


def quoting(words: str, quoted: str) -> str:
    """The text of a message that quotes another one, perhaps without words of its own."""
    return f"{words}\n\n{IN_REPLY}\n{quoted}".lstrip() if quoted else words


def kind_of(mime_type: str) -> Literal["image", "voice", "video", "file"]:
    """The kind of an attachment by the type that the vendor states. Its content decides later."""
    kinds: dict[str, Literal["image", "voice", "video"]] = {"image": "image", "audio": "voice", "video": "video"}
    return kinds.get(mime_type.partition("/")[0].lower(), "file")


async def download(
    outgoing: Outgoing,
    url: str,
    most: int,
    headers: Mapping[str, str] | None = None,
    template: str | None = None,
    timeout: float = 120.0,
) -> bytes:
    """The body of a file's address. Raises as `Vendor.fetch` does."""
    answer = await outgoing.request("GET", url, headers=headers, max_bytes=most, timeout=timeout, template=template)
    raise_for_transient(answer)
    if answer.status == 401:
        raise AccountRefused("HTTP 401")
    if answer.status != 200:
        raise EffectFailed(f"HTTP {answer.status}")
    return answer.body


def at_origin(vendor: Vendor[Any], origin: str, url: str, *hosts: str) -> str:
    """The address of a file, if it lies on one of the vendor's `hosts` or below it: a token must not go elsewhere.

    Under another origin than the vendor's, path and query are kept. Raises EffectFailed.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise EffectFailed("the address of the file is malformed") from None
    if origin != vendor.origin:
        return f"{origin}{parts.path}{f'?{parts.query}' if parts.query else ''}"
    host = parts.hostname or ""
    if parts.scheme != "https" or not any(host == one or host.endswith(f".{one}") for one in hosts):
        raise EffectFailed("the address of the file is not the vendor's")
    return url


def constant_time_equals(given: str, expected: str) -> bool:
    """Compares two secrets in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


def is_recent(timestamp: str, now: datetime) -> bool:
    """True if `timestamp` (Unix seconds in decimal digits) is within MAX_CLOCK_DIFFERENCE of `now`."""
    # More digits cannot be a current time, and int() is slow for very long input.
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        return False
    return abs(now.timestamp() - int(timestamp)) <= MAX_CLOCK_DIFFERENCE.total_seconds()


def raise_for_transient(answer: Answer, asked_seconds: float | None = None) -> None:
    """Raises for the statuses that say nothing about the message itself: 429 and 5xx.

    `asked_seconds`: the delay that the body asks for; without it the header Retry-After counts.
    """
    if answer.status == 504:
        # A gateway timed out. The server behind it may have accepted the message.
        raise Unanswered("HTTP 504")
    if answer.status == 429 or answer.status == 503:
        asked = retry_after(answer.headers) if asked_seconds is None else delay(asked_seconds)
        if asked is not None or answer.status == 429:
            raise RetryLater(asked or DEFAULT_RETRY, f"HTTP {answer.status}")
    if answer.status >= 500:
        raise Transient(f"HTTP {answer.status}")
