"""Sends deliveries to vendors."""

from __future__ import annotations

import asyncio
import io
from collections import Counter
from collections.abc import Awaitable
from datetime import timedelta
from mimetypes import guess_extension
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, InDoubt, InvalidMessage, NotFound, NotYet, TooLarge, Transient, Unanswered
from infra.outgoing.client import Outgoing
from infra.postgres import event_store
from infra.postgres.tx import Tx
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from infra.stores import filetypes
from infra.stores.cache import Cache
from infra.stores.objects import Objects, safe_name
from services.channel.accounts import store as accounts
from services.channel.accounts.store import AccountSecrets, ChannelAccount
from services.channel.domain import Delivery
from services.channel.events import File, OutboundContent
from services.channel.files.attachments import stored_objects
from services.channel.publishing import DELIVERY
from services.channel.vendors.base import AccountRefused, Outbound, OutboundFile, download

# A delivery of a paused channel is looked at again after this time.
PAUSE = timedelta(seconds=5)
# The files that this process fetches and sends at the same time, of one tenant and together.
FILES_OF_TENANT, FILES = 2, 8
BUSY = timedelta(seconds=1)
# Of one attempt to fetch a file, and between two attempts.
FILE_SECONDS = 20.0
PAUSES = (0.5, 2.0)
# A longer text is split in a thread.
LONG_TEXT = 10_000


_LOAD = f"""
-- Reads only; it locks nothing. The first event of a delivery names its channel and person.
SELECT e.types, e.versions, e.data, k.subject_id IS NOT NULL, k.wrapped,
       coalesce(c.last_at < clock_timestamp() - interval '24 hours', true), {accounts.COLUMNS}, account.token
FROM (
    SELECT array_agg(type ORDER BY version) AS types, array_agg(schema_version ORDER BY version) AS versions,
           array_agg(data ORDER BY version) AS data,
           convert_from((array_agg(data ORDER BY version))[1], 'UTF8')::jsonb AS asked
    FROM event
    WHERE stream_id = $1
) e
    LEFT JOIN account ON account.id = (e.asked ->> 'channel_id')::uuid AND account.tenant_id = $2
    LEFT JOIN conversation c ON c.session_key = e.asked ->> 'session_key' AND c.tenant_id = $2
    LEFT JOIN subject_key k ON k.tenant_id = $2 AND k.subject_id = e.asked ->> 'subject_id'
"""


class Sent(msgspec.Struct, frozen=True):
    vendor_message_id: str | None
    is_last: bool = False
    """As in `Outbound`. Effects from before this field was added have none."""


class NotSendable(Exception):
    """The delivery is not sent and the vendor is not called. The text is the reason that users see."""


class SendableDelivery(NamedTuple):
    """A loaded delivery."""

    account: ChannelAccount
    words: OutboundContent
    delivery_id: UUID
    run_id: UUID | None
    session_key: str
    webhook: str
    """The address for the vendor's receipts; empty if it is not asked for them."""
    is_late: bool
    """As in `Outbound`."""
    sent: tuple[str | None, ...]
    """As in `Delivery`."""
    due: tuple[int, ...]
    """As in `Delivery`; empty: all parts are to be sent."""

    async def parts(self) -> list[Outbound]:
        """The text and the files in parts that the vendor accepts. Raises NotSendable if there are none."""
        vendor, words, text = self.account.vendor, self.words, self.words.text
        files = tuple(file for file in words.files if vendor.files and not (file.path and vendor.files_by_address))
        if links := [file.link for file in words.files if file not in files]:
            text = f"{text}\n\n" + "\n".join(links)
        # To render a megabyte of Markdown takes many seconds, in which this process would do nothing else.
        texts = await asyncio.to_thread(vendor.split, text) if len(text) > LONG_TEXT else vendor.split(text)
        if not texts:
            raise NotSendable("the text is empty")
        contents: list[tuple[str, File | None]] = [
            *((text, None) for text in texts),
            *((one.link, one) for one in files),
        ]
        return [
            Outbound(
                key=str(self.delivery_id) if len(contents) == 1 else f"{self.delivery_id}-{n}",
                conversation=words.conversation,
                text=text,
                reply_to=words.reply_to if n == 1 else None,
                run_id=self.run_id,
                answers=words.reply_to,
                part=n,
                is_last=n == len(contents),
                file=OutboundFile(file.url, file.name, path=file.path) if file else None,
                webhook=self.webhook,
                is_late=self.is_late,
            )
            for n, (text, file) in enumerate(contents, 1)
        ]


class Sender:
    """Loads and sends deliveries."""

    def __init__(
        self,
        secrets: AccountSecrets,
        subjects: SubjectKeys,
        outgoing: Outgoing,
        cache: Cache,
        objects: Objects,
        public_url: str,
    ) -> None:
        self._secrets = secrets
        self._subjects = subjects
        self._outgoing = outgoing
        self._cache = cache
        self._objects = objects
        self._public_url = public_url.rstrip("/")
        self._files = Counter[str]()
        """The files in memory, by tenant."""

    async def load(self, tx: Tx, delivery_id: UUID) -> SendableDelivery:
        """Loads a delivery. Raises NotSendable with the reason, NotYet if the channel is paused."""
        stream = DELIVERY.stream(str(delivery_id))
        [(types, versions, data, has_key, wrapped, is_late, *row, token)] = await tx.sql(
            _LOAD, stream.row, tx.tenant_id
        )
        delivery: Delivery = event_store.folded(stream, zip(types, versions, data, strict=True))
        assert delivery.queued is not None, "DeliveryQueued is stored in the transaction that enqueues the item"
        if delivery.state != "queued":
            # A repeated request after the lane and its effects were pruned. The stored delivery knows the outcome.
            raise NotSendable("the delivery has already ended")
        if row[0] is None:
            raise NotSendable("the channel was deleted")
        account = self._secrets.account(tuple(row))
        if not account.enabled:
            # Nothing is lost by a pause: the delivery waits for the channel until it expires.
            raise NotYet(PAUSE, "the channel is paused")
        if account.broken_reason:
            raise NotSendable(f"the channel is broken: {account.broken_reason}")
        # A person has a key from the first delivery on. Without one, nothing that this key seals can be read.
        subject = account.tenant_id, delivery.queued.subject_id
        key = self._subjects.opened(subject, wrapped) if has_key else None
        if key is None:
            raise NotSendable("the person was erased")
        content = key.open(delivery.queued.content, str(delivery_id), "content")
        words = msgspec.json.decode(content, type=OutboundContent)
        webhook = self._webhook(account, token) if account.vendor.receipts_asked else ""
        return SendableDelivery(
            account,
            words,
            delivery_id,
            delivery.queued.run_id,
            delivery.queued.session_key,
            webhook,
            is_late,
            delivery.sent,
            delivery.due,
        )

    def _webhook(self, account: ChannelAccount, token: bytes) -> str:
        opened = self._secrets.open(account.id, "token", token).decode()
        return self._public_url + accounts.WEBHOOK_PATH.format(type=account.vendor.name, token=opened)

    async def send(self, account: ChannelAccount, part: Outbound) -> Sent:
        """Raises as `Vendor.send` does, and TooManyRequests if the vendor's rate limit is used up."""
        if part.file is None:
            return await self._send(account, part)
        tenant = account.tenant_id
        if self._files[tenant] >= FILES_OF_TENANT or self._files.total() >= FILES:
            # It waits outside of this process's memory and without one of the runner's places.
            raise NotYet(BUSY, "other files are being sent")
        self._files[tenant] += 1
        try:
            return await self._send(account, await self._fetched(account, part, part.file))
        finally:
            self._files[tenant] -= 1
            # A counter keeps the names that have come to 0.
            self._files += Counter()

    async def _send(self, account: ChannelAccount, part: Outbound) -> Sent:
        for limit in account.vendor.limits(part.conversation):
            scope = account.pseudonyms.limit(limit.scope)
            await self._cache.limit(str(account.id), scope, times=limit.times, seconds=limit.seconds)
        try:
            sent = await account.vendor.send(self._outgoing, account.origin, account.credentials, part)
        except InvalidMessage as error:
            # The address is private: it was not called.
            raise EffectFailed(str(error)) from error
        except Unanswered as error:
            if account.vendor.effect_of(part) == "keyed":
                # The vendor drops repeats by our key, so the message may be sent again.
                raise InDoubt(str(error)) from error
            raise
        return Sent(sent, part.is_last)

    async def _fetched(self, account: ChannelAccount, part: Outbound, file: OutboundFile) -> Outbound:
        """The part with the file's content; as a text with its link if the vendor does not take it.

        Raises EffectFailed also if the file's host does not answer: it must not hold up the conversation for as long as
        an unavailable vendor may.
        """
        limits = account.vendor.files
        try:
            content = await self._content_of(file, max(limits.values()))
            if not content:
                raise EffectFailed("it is empty")
            type_ = await asyncio.to_thread(filetypes.content_type, io.BytesIO(content), file.name)
        except TooLarge:
            return part._replace(file=None)
        except (EffectFailed, InvalidMessage, Transient, Unanswered) as error:
            # Not the error itself: a 401 of the file's host says nothing about the account, and nothing was sent.
            reason = str(error).removeprefix(AccountRefused.PREFIX)
            raise EffectFailed(f"the file could not be fetched: {reason}") from error
        if len(content) > limits.get(type_, limits.get("", 0)):
            return part._replace(file=None)
        return part._replace(file=file._replace(name=_named(file, type_), content_type=type_, content=content))

    async def _content_of(self, file: OutboundFile, most: int) -> bytes:
        if not file.path:
            return await self._download(file.url, most)
        try:
            async with self._objects.fetch(file.path) as stored:
                content = stored.read(most + 1)
        except NotFound as error:
            raise EffectFailed("it was deleted") from error
        if len(content) > most:
            raise TooLarge(f"file: more than {most} bytes")
        return content

    async def _download(self, url: str, most: int) -> bytes:
        for pause in PAUSES:
            try:
                return await download(self._outgoing, url, most, timeout=FILE_SECONDS)
            except (Transient, Unanswered):
                await asyncio.sleep(pause)
        return await download(self._outgoing, url, most, timeout=FILE_SECONDS)

    async def edit(self, account: ChannelAccount, part: Outbound, shown: str) -> None:
        """Puts the text into the message `shown`, which may happen twice. Raises as `send` does, never Unanswered."""
        await self._repeatable(account.vendor.edit(*self._about(account, part), shown))

    async def retract(self, account: ChannelAccount, part: Outbound, shown: str) -> None:
        """Deletes the message `shown`. Raises as `edit` does."""
        await self._repeatable(account.vendor.retract(*self._about(account, part), shown))

    def _about(self, account: ChannelAccount, part: Outbound) -> tuple[Outgoing, str, Any, Outbound]:
        return self._outgoing, account.origin, account.credentials, part

    async def _repeatable(self, call: Awaitable[None]) -> None:
        try:
            await call
        except InvalidMessage as error:
            raise EffectFailed(str(error)) from error
        except Unanswered as error:
            raise Transient(str(error)) from error


def _named(file: OutboundFile, type_: str) -> str:
    """The name of the file, with an extension, by which vendors and people know its type."""
    name = safe_name(file.name or unquote(urlsplit(file.url).path))
    return name if "." in name else name + (guess_extension(type_) or "")


def sender(runtime: Runtime) -> Sender:
    return Sender(
        AccountSecrets(runtime.cipher),
        SubjectKeys(runtime.cipher),
        runtime.outgoing,
        Cache(runtime.cache),
        stored_objects(runtime),
        runtime.settings.public_url,
    )
