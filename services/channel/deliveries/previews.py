"""Shows a person that a run is at work: that the bot is typing, or the answer while it is written.

The agent reports its progress by Redis. One instance of this service shows each piece of news; a lost one does no harm.
An answer in a message that is edited has a row in the table ``preview``. Its delivery puts the finished answer into
that message. Both hold the row's lock, so an unfinished text never replaces the finished one. The message of a run
that ends without a delivery is deleted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable
from contextlib import aclosing
from datetime import timedelta
from typing import NamedTuple, TypeVar
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, InvalidMessage, RetryLater, TooManyRequests, Transient, Unanswered, describe
from infra.observe.logs import get_logger
from infra.outgoing.client import Outgoing
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.recent import Recent
from infra.security.subjects import Erased, SubjectKeys
from infra.service.service import Runtime
from infra.stores.cache import Cache, cancel_listener
from infra.web import data_urls
from protos.pubsub import RUN_PROGRESS
from services.channel.accounts import store as accounts
from services.channel.accounts.store import AccountSecrets, ChannelAccount
from services.channel.events import InboundContent
from services.channel.publishing import CONVERSATION
from services.channel.vendors.base import PLACEHOLDER, Outbound

# Each holds a connection to the database while the vendor is called. News that finds all of them busy is dropped.
MAX_SHOWN = 4
# Of one tenant: its vendor's server may be slow.
MAX_SHOWN_OF_TENANT = 2
# Of one account: the vendor's limits are for its answers.
PER_SECOND = 10
# Characters of an answer that is being written; more than a message of any vendor holds.
SHOWN = 30_000
# Less than the time after which the database ends an idle transaction.
CALL_SECONDS = 3.5
SWEEP_SECONDS = 30.0
# A run that is at work reports its progress every few seconds.
ABANDONED = timedelta(minutes=3)
# A delivery expires earlier.
KEEP = timedelta(days=2)
# Accounts whose vendor has named a pause; more of them are forgotten.
MAX_PAUSED = 10_000
# The newest messages of a conversation that are searched for its place at the vendor.
LATEST = 10

_REFUSALS = (EffectFailed, Transient, Unanswered, InvalidMessage, TimeoutError)
T = TypeVar("T")
_log = get_logger("channel.previews")

_ABANDONED = """
-- Locks the preview; one that another process deletes is skipped.
SELECT run_id, session_key, message_id, stopped FROM preview
WHERE updated_at < clock_timestamp() - $1::interval AND delivery_id IS NULL AND message_id IS NOT NULL
ORDER BY updated_at
LIMIT 1
FOR UPDATE SKIP LOCKED
"""
_OF_RUN = """
-- Waits for an edit that is under way.
SELECT run_id, session_key, message_id, stopped FROM preview
WHERE run_id = $1 AND delivery_id IS NULL AND message_id IS NOT NULL
FOR UPDATE
"""


class Progress(msgspec.Struct, frozen=True):
    """The agent's news of a run."""

    run_id: UUID
    session_key: str
    text: str
    """The answer so far; empty before the model writes."""
    over: bool = False
    """The run has ended, and sends nothing."""


class _Place(NamedTuple):
    """The account and the conversation that the progress is shown in."""

    account: ChannelAccount
    message: Outbound


class Previews:
    """Listens to the agent and calls the vendors."""

    def __init__(
        self, database: Database, secrets: AccountSecrets, subjects: SubjectKeys, outgoing: Outgoing, cache: Cache
    ) -> None:
        self._database = database
        self._secrets = secrets
        self._subjects = subjects
        self._outgoing = outgoing
        self._cache = cache
        self._showing: set[asyncio.Task[None]] = set()
        self._calls = Counter[str]()
        """The calls of vendors, by tenant."""
        self._paused: Recent[UUID, float] = Recent(MAX_PAUSED)
        """The accounts whose vendor has named a pause, and its end."""
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        loops = {asyncio.create_task(self._listen()), asyncio.create_task(self._sweep_often())}
        stopping = asyncio.create_task(self._stopped.wait())
        done, _ = await asyncio.wait({*loops, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in loops:
            await cancel_listener(task)
        await asyncio.gather(*self._showing, return_exceptions=True)
        for task in loops & done:
            task.result()

    async def stop(self) -> None:
        self._stopped.set()

    async def _listen(self) -> None:
        async with aclosing(self._cache.listen(RUN_PROGRESS)) as messages:
            async for message in messages:
                if message is None or len(self._showing) >= MAX_SHOWN:
                    continue
                try:
                    progress = msgspec.json.decode(message[1], type=Progress)
                except msgspec.DecodeError as error:
                    _log.warning("skipped an invalid live update of a run", error=str(error))
                    continue
                task = asyncio.create_task(self._show(progress))
                self._showing.add(task)
                task.add_done_callback(self._showing.discard)

    async def _show(self, progress: Progress) -> None:
        try:
            if progress.over:
                await self._take_back(_OF_RUN, progress.run_id)
                return
            # One instance shows it.
            await self._cache.limit(progress.session_key, "progress", times=1, seconds=1)
            await self.show(progress)
        except TooManyRequests:
            pass
        except _REFUSALS as error:
            _log.info("could not show the progress of a run", run_id=str(progress.run_id), error=describe(error))
        except Exception:
            _log.warning("could not show the progress of a run", run_id=str(progress.run_id), exc_info=True)

    async def show(self, progress: Progress) -> None:
        """Raises as `Vendor.send` does, TooManyRequests if it is too early, TimeoutError if the vendor is slow."""
        async with self._database.begin() as tx:
            place = await self._place(tx, progress.run_id, progress.session_key)
        if place is None or self._calls[place.account.tenant_id] >= MAX_SHOWN_OF_TENANT:
            return
        self._calls[place.account.tenant_id] += 1
        try:
            await self._show_at(*place, progress)
        finally:
            self._calls[place.account.tenant_id] -= 1

    async def _show_at(self, account: ChannelAccount, message: Outbound, progress: Progress) -> None:
        vendor = account.vendor
        if self._paused.get(account.id, 0.0) > time.monotonic():
            return
        await self._cache.limit(str(account.id), "progress", times=PER_SECOND, seconds=1)
        # A file in the answer is sent after it.
        so_far = data_urls.replaced(progress.text, lambda *_: PLACEHOLDER)
        text = vendor.split(so_far[:SHOWN])[:1] if account.streaming and vendor.preview else ()
        if text:
            message = message._replace(text=text[0])
            await self._cache.limit(progress.session_key, "preview", times=1, seconds=vendor.preview_seconds)
            if vendor.preview == "edit":
                await self._edit(account, message, progress)
                return
            try:
                draft = vendor.draft(self._outgoing, account.origin, account.credentials, message)
                await self._answered(account, draft)
                return
            except EffectFailed as error:
                _log.info("could not show a draft", run_id=str(progress.run_id), error=str(error))
        if vendor.sign_seconds:
            await self._cache.limit(progress.session_key, "typing", times=1, seconds=vendor.sign_seconds)
            sign = vendor.show_typing(self._outgoing, account.origin, account.credentials, message)
            await self._answered(account, sign)

    async def _answered(self, account: ChannelAccount, call: Awaitable[T]) -> T:
        """The vendor's answer. A refusal that names a pause keeps the news of the account's runs back for this time."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await call
        except RetryLater as error:
            self._paused[account.id] = time.monotonic() + error.after.total_seconds()
            raise

    async def _edit(self, account: ChannelAccount, message: Outbound, progress: Progress) -> None:
        async with self._database.begin(tenant_id=account.tenant_id) as tx:
            rows = await tx.sql(
                """
                -- Locks the row until the vendor has answered: the delivery waits meanwhile.
                INSERT INTO preview AS p (run_id, tenant_id, channel_id, session_key) VALUES ($1, $2, $3, $4)
                ON CONFLICT (run_id) DO UPDATE SET updated_at = clock_timestamp()
                WHERE p.delivery_id IS NULL AND NOT p.stopped
                RETURNING message_id
                """,
                progress.run_id,
                account.tenant_id,
                account.id,
                progress.session_key,
            )
            if not rows:
                return
            vendor, [(shown,)] = account.vendor, rows
            arguments = self._outgoing, account.origin, account.credentials, message
            error: Exception | None = None
            try:
                if shown is None:
                    # The text comes with the next news, when the id of its message is stored.
                    shown = await self._answered(account, vendor.place(*arguments))
                else:
                    await self._answered(account, vendor.edit(*arguments, shown))
            except _REFUSALS as refused:
                error = refused
            # An edit that was not answered may be made again with the next text. A message that was not answered may be
            # there nevertheless: another attempt could leave a second one.
            again = (Transient,) if shown is None else (Transient, Unanswered, TimeoutError)
            await tx.sql(
                "UPDATE preview SET message_id = $2, stopped = $3 WHERE run_id = $1",
                progress.run_id,
                shown,
                shown is None if error is None else not isinstance(error, again),
            )
        if error:
            raise error

    async def _place(self, tx: Tx, run_id: UUID, session_key: str) -> _Place | None:
        """The conversation's place at the vendor; None if nothing can be sent there."""
        rows = await tx.sql(
            """
            SELECT c.tenant_id, m.event_id, m.type, m.schema_version, m.data
            FROM conversation c CROSS JOIN LATERAL (
                SELECT event_id, type, schema_version, data, version FROM event
                WHERE stream_id = $1 || c.session_key
                ORDER BY version DESC
                LIMIT $3
            ) m
            WHERE c.session_key = $2
            ORDER BY m.version DESC
            """,
            CONVERSATION.stream("").row,
            session_key,
            LATEST,
        )
        facts = [(*row[:2], CONVERSATION.events.decode(*row[2:])) for row in rows]
        # A deleted message has no content, so it does not have its place at the vendor any more.
        found = next((one for one in facts if one[2].content), None)
        if found is None:
            return None
        tenant_id, event_id, fact = found
        account = await accounts.read(tx, self._secrets, fact.channel_id)
        if account is None or not account.enabled or account.broken_reason:
            return None
        try:
            key = await self._subjects.key(tx, tenant_id, fact.subject_id)
        except Erased:
            return None
        content = msgspec.json.decode(key.open(fact.content, str(event_id), "content"), type=InboundContent)
        message = Outbound(
            f"{run_id}", content.conversation, "", reply_to=content.message, run_id=run_id, answers=content.message
        )
        return _Place(account, message)

    async def _sweep_often(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                while await self.sweep(ABANDONED):
                    pass
                await self._database.autocommit(
                    "DELETE FROM preview WHERE updated_at < clock_timestamp() - $1::interval", KEEP
                )
            except Exception as error:
                _log.warning(
                    f"could not delete abandoned previews; will retry in {SWEEP_SECONDS:g} s", error=describe(error)
                )

    async def sweep(self, age: timedelta) -> bool:
        """Deletes the message of one run that told nothing for `age`. False if there is none."""
        return await self._take_back(_ABANDONED, age)

    async def _take_back(self, which: str, argument: timedelta | UUID) -> bool:
        async with self._database.begin() as tx:
            rows = await tx.sql(which, argument)
            if not rows:
                return False
            [(run_id, session_key, shown, tried)] = rows
            again = False
            if place := await self._place(tx, run_id, session_key):
                account, message = place
                try:
                    async with asyncio.timeout(CALL_SECONDS):
                        await account.vendor.retract(
                            self._outgoing, account.origin, account.credentials, message, shown
                        )
                except _REFUSALS as error:
                    _log.warning("could not delete the preview of a run", run_id=str(run_id), error=describe(error))
                    again = not tried and not isinstance(error, EffectFailed)
            await tx.sql(
                """
                UPDATE preview SET message_id = $2, stopped = true, updated_at = clock_timestamp() WHERE run_id = $1
                """,
                run_id,
                # Once more, after the same time.
                shown if again else None,
            )
        return True


async def take_over(tx: Tx, account: ChannelAccount, run_id: UUID, session_key: str, delivery_id: UUID) -> str | None:
    """The vendor's id of the message in which the person saw the run's answer being written, if this delivery is the
    run's first: it replaces the text. None if there is none.

    Waits for an edit that is under way. From the commit on the message is not edited any more.
    """
    [(shown,)] = await tx.sql(
        """
        INSERT INTO preview AS p (run_id, tenant_id, channel_id, session_key, delivery_id)
        VALUES ($1, $2, $3, $4, $5)
        ON CONFLICT (run_id) DO UPDATE SET delivery_id = coalesce(p.delivery_id, excluded.delivery_id)
        RETURNING CASE WHEN delivery_id = $5 THEN message_id END
        """,
        run_id,
        tx.tenant_id,
        account.id,
        session_key,
        delivery_id,
    )
    return shown  # type: ignore[no-any-return]


def previews(runtime: Runtime) -> Previews:
    return Previews(
        runtime.worker,
        AccountSecrets(runtime.cipher),
        SubjectKeys(runtime.cipher),
        runtime.outgoing,
        Cache(runtime.cache),
    )
