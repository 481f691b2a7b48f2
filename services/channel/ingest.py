"""Accepts the items of verified webhook calls, and stores messages in their conversations.

A call is accepted by one statement: dedupe rows, and a row in the table ``accepted`` for each new message. The answer
200 follows its commit. The drainer moves accepted messages, oldest first, into their conversations: position, fact and
outbox rows, in the transaction that deletes the accepted rows. While few calls arrive and no accepted row waits, a call
is stored in its conversation directly, so that a message needs one commit. Decision 13 has the reasons.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import NamedTuple
from uuid import UUID

import msgspec
from msgspec.structs import replace

from infra.clock import utcnow, uuid7, wait_at_most
from infra.errors import TooLarge, Transient, describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from infra.postgres.group_commit import GroupCommit
from infra.postgres.tx import MAX_MESSAGE_BYTES, Database, Tx
from infra.security.crypto import Cipher, DataKey
from infra.security.rewrap import SealedColumn
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from services.channel.accounts import Account
from services.channel.attachments import FETCHES, FetchAttachments, publish
from services.channel.domain import dedupe_hash
from services.channel.events import InboundContent, MessageTaken
from services.channel.publishing import CONVERSATION
from services.channel.receipts import record
from services.channel.routing import is_for_the_bot, routed
from services.channel.vendors.base import Ignored, Inbound, Moved, Receipt

OTHER_FIELDS_BYTES = 2_000
"""Of a MessageReceived, apart from the texts of the vendor: ids, times and names of fields."""
# The most calls in one statement.
ACCEPTED = SealedColumn("accepted", "sealed", "accepted", ("encode(hash, 'hex')",))
MAX_GROUP = 500
# Up to this many calls are stored directly. More at once mean load, and under load acceptance comes first.
MAX_DIRECT = 8
# More waiting calls than this are refused with 503, so that memory stays bounded while the database is slow.
MAX_WAITING = 10_000
# The most messages in one transaction of the drainer.
DRAIN_ROWS = 500
# The pause between two transactions of the drainer under load. Rows gather in it, and calls get the larger share of the
# processor.
DRAIN_PAUSE_SECONDS = 0.1
# The drainer looks this often for rows that another process accepted before it died.
DRAIN_POLL_SECONDS = 5.0
# The delay before a message is drained again that could not be drained.
RETRY_DELAY = timedelta(minutes=1)
# Longer than the retry horizon of every vendor. WhatsApp has the longest: seven days.
KEEP_SEEN = timedelta(days=30)
# Few rows at a time, because one call waits for the deletion.
CLEANING_SECONDS = 1.0
CLEANING_ROWS = 2_000

_log = get_logger("channel.ingest")

# Inserts dedupe rows in the order of their hashes, so that concurrent transactions wait for each other in one order,
# and waits for a transaction that inserts the same hash. It inserts nothing while accepted rows wait: a message stored
# directly would overtake them. Rows that a drainer is deleting still count, until it has committed.
_NOTE = """
    WITH idle AS (
        SELECT NOT EXISTS (SELECT FROM accepted WHERE retry_at IS NULL) AS idle
    ), fresh AS (
        INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored)
        SELECT n.* FROM unnest($1::bytea[], $2::text[], $3::uuid[], $4::text[]) AS n, idle WHERE idle.idle
        ON CONFLICT DO NOTHING
        RETURNING hash
    )
    SELECT idle.idle, fresh.hash FROM idle LEFT JOIN fresh ON true
"""

# Inserts dedupe rows as above, and an accepted row for each message that has all its hashes for itself. Positions are
# drawn in the order of the messages.
_ACCEPT = """
    WITH n AS (
        SELECT * FROM unnest($1::bytea[], $2::text[], $3::uuid[], $4::text[], $5::int[])
            AS n(hash, tenant_id, channel_id, ignored, message)
    ), fresh AS (
        INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored)
        SELECT hash, tenant_id, channel_id, ignored FROM n
        ON CONFLICT DO NOTHING
        RETURNING hash
    ), new AS (
        SELECT message FROM n LEFT JOIN fresh USING (hash) GROUP BY message HAVING count(*) = count(fresh.hash)
    )
    INSERT INTO accepted (tenant_id, channel_id, hash, sealed, traceparent)
    SELECT tenant_id, channel_id, hash, sealed, traceparent
    FROM unnest($6::int[], $7::text[], $8::uuid[], $9::bytea[], $10::bytea[], $11::text[])
        AS m(message, tenant_id, channel_id, hash, sealed, traceparent)
    JOIN new USING (message)
    ORDER BY message
"""

# Locks from the oldest row on. A second drainer waits for that row, and so for the end of the first one's transaction:
# messages enter a conversation in the order in which they were accepted.
_DRAIN = """
    DELETE FROM accepted WHERE position IN (
        SELECT position FROM accepted WHERE retry_at IS NULL OR retry_at < clock_timestamp()
        ORDER BY position LIMIT $1 FOR UPDATE
    )
    RETURNING position, hash, sealed, traceparent
"""

# Counts the messages of each conversation. The rows stay locked until the transaction ends, so no other transaction
# gets these or later positions before. Sorted by session key, as every transaction locks them.
_COUNT = """
    INSERT INTO conversation AS c (session_key, tenant_id, channel_id, subject_id, position, last_at)
    SELECT n.*, clock_timestamp() FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[], $5::bigint[]) AS n
    ON CONFLICT (session_key) DO UPDATE
    SET subject_id = excluded.subject_id, position = c.position + excluded.position, last_at = excluded.last_at
    RETURNING session_key, position
"""


class AcceptedMessage(msgspec.Struct, frozen=True):
    """A person's message with everything that its conversation needs: the sealed form in the table ``accepted``."""

    tenant_id: str
    channel_id: UUID
    channel_type: str
    agent_id: UUID
    session_key: str
    subject_id: str
    content: InboundContent
    received_at: datetime
    parent_session_key: str = ""
    """The session of the conversation that this one branched off from; empty if there is none."""
    by_admin: bool = False


class _New(NamedTuple):
    """A message that is not a repeat."""

    message: AcceptedMessage
    hash: bytes
    """The first of its dedupe hashes."""
    traceparent: str | None


class _Arrival(NamedTuple):
    """One item of a call, with its dedupe hashes."""

    account: Account
    item: Inbound | Ignored
    hashes: list[bytes]
    traceparent: str | None


class Ingest:
    """The intake of one process."""

    def __init__(self, database: Database, cipher: Cipher, subjects: SubjectKeys) -> None:
        self._database = database
        self._cipher = cipher
        self._subjects = subjects
        # One group after the other: messages of a conversation are stored in the order of their arrival.
        self._commits = GroupCommit(self._commit, largest=MAX_GROUP)
        self._waiting = 0
        self._cleaned_at = time.monotonic()
        self.accepted = asyncio.Event()
        """Set after accepted rows were written, so that the drainer looks for them."""

    @property
    def is_busy(self) -> bool:
        return self._waiting > MAX_DIRECT

    async def accept(self, account: Account, items: Sequence[Inbound | Ignored | Moved | Receipt]) -> None:
        """Returns once all items are committed. Repeats change nothing.

        Raises the error of the database; then nothing is stored, and the vendor has to send the call again.
        """
        if self._waiting >= MAX_WAITING:
            raise Transient("too many webhook calls wait to be stored")
        traceparent = telemetry.carrier().get("traceparent")
        if receipts := [item for item in items if isinstance(item, Receipt)]:
            await record(self._database, account, receipts)
        arrivals = []
        for item in items:
            if isinstance(item, Moved):
                await self._move(account, item)
            checked = _checked(account, item)
            hashes = [dedupe_hash(account.id, id_) for id_ in checked.ids]
            arrivals.append(_Arrival(account, checked, hashes, traceparent))
        self._waiting += 1
        try:
            await self._commits.write(arrivals)
        finally:
            self._waiting -= 1
        if time.monotonic() - self._cleaned_at > CLEANING_SECONDS:
            self._cleaned_at = time.monotonic()
            await self._clean()

    async def _move(self, account: Account, moved: Moved) -> None:
        """From now on, messages with the new id enter the session of the old one. A repeat changes nothing."""
        await self._database.autocommit(
            """
            INSERT INTO session_alias (session_key, tenant_id, target)
            SELECT $1, $2, coalesce((SELECT target FROM session_alias WHERE session_key = $3), $3)
            ON CONFLICT DO NOTHING
            """,
            account.pseudonyms.session(moved.new),
            account.tenant_id,
            account.pseudonyms.session(moved.old),
        )

    async def _commit(self, group: Sequence[list[_Arrival]]) -> Mapping[int, Exception]:
        arrivals = [arrival for call in group for arrival in call]
        if len(group) > MAX_DIRECT or not await self._store_directly(arrivals):
            await self._accept(arrivals)
        return {}

    async def _store_directly(self, arrivals: Sequence[_Arrival]) -> bool:
        """Stores the messages in their conversations. Returns False, and stores nothing, while accepted rows wait."""
        owners = _owners(arrivals)
        hashes = sorted(owners)

        async def work(tx: Tx) -> bool:
            rows = await tx.sql(_NOTE, hashes, *_seen_columns(owners, hashes))
            if not rows[0][0]:
                return False
            fresh = {bytes(hash_) for _, hash_ in rows if hash_ is not None}
            await self._store(tx, [_new(one) for one in _first(arrivals, owners) if fresh.issuperset(one.hashes)])
            return True

        return await self._database.run(work)

    async def _accept(self, arrivals: Sequence[_Arrival]) -> None:
        owners = _owners(arrivals)
        hashes = sorted(owners)
        first = _first(arrivals, owners)
        messages = [_new(arrival) for arrival in first]
        numbers = {id(arrival): number for number, arrival in enumerate(first)}
        failpoint("before_accept")
        await self._database.autocommit(
            _ACCEPT,
            hashes,
            *_seen_columns(owners, hashes),
            # Only a message with all its hashes for itself has a number. Hashes without one are stored all the same.
            [numbers.get(id(owners[hash_])) for hash_ in hashes],
            list(range(len(messages))),
            [new.message.tenant_id for new in messages],
            [new.message.channel_id for new in messages],
            [new.hash for new in messages],
            [self._cipher.seal(msgspec.json.encode(new.message), "accepted", new.hash.hex()) for new in messages],
            [new.traceparent for new in messages],
        )
        failpoint("after_accept")
        self.accepted.set()

    async def drain(self) -> int:
        """Moves the oldest accepted messages into their conversations. Returns their number."""
        try:
            return await self._drain(DRAIN_ROWS)
        except Exception as error:
            if is_transient(error):
                raise
            # One of the messages is at fault. Each alone: the others must not wait for it.
            _log.warning("could not drain accepted messages together; draining them one by one", error=describe(error))
        drained = 0
        while drained < DRAIN_ROWS and await self._drain_one():
            drained += 1
        return drained

    async def _drain(self, limit: int) -> int:
        failpoint("before_drain")

        async def work(tx: Tx) -> int:
            rows = sorted(await tx.sql(_DRAIN, limit))
            await self._store(tx, [self._open(bytes(hash_), sealed, trace) for _, hash_, sealed, trace in rows])
            failpoint("before_drain_commit")
            return len(rows)

        drained = await self._database.run(work)
        failpoint("after_drain")
        return drained

    async def _drain_one(self) -> int:
        try:
            return await self._drain(1)
        except Exception as error:
            if is_transient(error):
                raise
            rows = await self._database.autocommit(
                """
                UPDATE accepted SET attempts = attempts + 1, retry_at = clock_timestamp() + $1::interval
                WHERE position = (
                    SELECT position FROM accepted WHERE retry_at IS NULL OR retry_at < clock_timestamp()
                    ORDER BY position LIMIT 1 FOR UPDATE
                )
                RETURNING channel_id, attempts
                """,
                RETRY_DELAY,
            )
            for channel_id, attempts in rows:
                _log.error(
                    f"could not drain an accepted message; will retry in {RETRY_DELAY.total_seconds():g} s",
                    channel_id=str(channel_id),
                    attempts=attempts,
                    exc_info=True,
                )
            return len(rows)

    def _open(self, hash_: bytes, sealed: bytes, traceparent: str | None) -> _New:
        content = self._cipher.open(sealed, "accepted", hash_.hex())
        return _New(msgspec.json.decode(content, type=AcceptedMessage), hash_, traceparent)

    async def _store(self, tx: Tx, messages: Sequence[_New]) -> None:
        """Stores messages in their conversations. Messages of erased persons are dropped here.

        Locks, each kind in the order of its keys: subject keys, conversations, streams.
        """
        if not messages:
            return
        messages = await _with_aliases(tx, messages)
        keys = await self._subjects.keys(tx, {(new.message.tenant_id, new.message.subject_id) for new in messages})
        kept = [(new, key) for new in messages if (key := keys[new.message.tenant_id, new.message.subject_id])]
        if len(kept) < len(messages):
            await tx.sql(
                "UPDATE inbound_seen SET ignored = 'the author was erased' WHERE hash = ANY($1::bytea[])",
                sorted({new.hash for new in messages} - {new.hash for new, _ in kept}),
            )
        positions = await _draw_positions(tx, [new.message for new, _ in kept])
        for new, key in kept:
            # In the trace of the webhook call.
            with telemetry.continued(new.traceparent):
                _record(tx, new.message, key, next(positions[new.message.session_key]))

    async def _clean(self) -> None:
        try:
            await self._database.autocommit(
                """
                DELETE FROM inbound_seen WHERE hash IN (
                    SELECT hash FROM inbound_seen WHERE seen_at < now() - $1::interval LIMIT $2
                )
                """,
                KEEP_SEEN,
                CLEANING_ROWS,
            )
        except Exception as error:
            _log.warning(
                f"could not prune inbound_seen; will retry in {CLEANING_SECONDS:g} s or later", error=describe(error)
            )


class Drainer:
    """Drains the messages that this process or a dead one has accepted."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest
        self._stopping = False

    async def run(self) -> None:
        while not self._stopping:
            self._ingest.accepted.clear()
            try:
                drained = await self._ingest.drain()
            except Exception as error:
                _log.warning("could not drain accepted messages; will retry in 1 s", error=describe(error))
                await wait_at_most(1.0, self._ingest.accepted)
                continue
            if drained == 0:
                await wait_at_most(DRAIN_POLL_SECONDS, self._ingest.accepted)
            elif drained > MAX_DIRECT and (drained < DRAIN_ROWS or self._ingest.is_busy):
                # Load. Without the pause each group of calls would be a transaction of the drainer, too.
                await asyncio.sleep(DRAIN_PAUSE_SECONDS)

    async def stop(self) -> None:
        self._stopping = True
        self._ingest.accepted.set()


def ingest(runtime: Runtime) -> Ingest:
    """The intake of this process: the webhooks and the drainer share it."""
    return _ingest(runtime.worker, runtime.cipher)


@cache
def _ingest(database: Database, cipher: Cipher) -> Ingest:
    return Ingest(database, cipher, SubjectKeys(cipher))


def _checked(account: Account, item: Inbound | Ignored | Moved | Receipt) -> Inbound | Ignored:
    """Ignores items of a disabled account and empty texts. Removes NUL, which databases refuse.

    Raises TooLarge if the buses could not carry the message: the vendor must not get a 200 for it.
    """
    if isinstance(item, Ignored):
        return item
    if isinstance(item, Moved):
        return Ignored(item.ids, "the conversation got another id")
    if isinstance(item, Receipt):
        return Ignored(item.ids, f"a receipt: {item.state}")
    if not account.enabled:
        return Ignored(item.ids, "the channel is paused")
    if not item.conversation or not item.person:
        return Ignored(item.ids, "without a conversation or an author")
    if not is_for_the_bot(account.groups, item):
        # Under its first id only: Slack tells a mention in a second event about the same message.
        return Ignored(item.ids[:1], f"a message of a group; only {account.groups} are answered")
    text = item.text.replace("\0", "")
    size = len(msgspec.json.encode((text, item.conversation, item.message, item.attachments)))
    if size > MAX_MESSAGE_BYTES - OTHER_FIELDS_BYTES:
        raise TooLarge(f"message: has {size} bytes; must have at most {MAX_MESSAGE_BYTES - OTHER_FIELDS_BYTES}")
    if not text.strip() and not item.attachments:
        return Ignored(item.ids, "the text is empty")
    return item._replace(text=text)


def _owners(arrivals: Sequence[_Arrival]) -> dict[bytes, _Arrival]:
    """The first arrival of the group with each hash; later ones are repeats."""
    return {hash_: arrival for arrival in reversed(arrivals) for hash_ in arrival.hashes}


def _first(arrivals: Sequence[_Arrival], owners: Mapping[bytes, _Arrival]) -> list[_Arrival]:
    """The messages that repeat no earlier arrival of the group under any of their hashes."""
    return [
        arrival
        for arrival in arrivals
        if isinstance(arrival.item, Inbound) and all(owners[hash_] is arrival for hash_ in arrival.hashes)
    ]


def _seen_columns(
    owners: Mapping[bytes, _Arrival], hashes: Sequence[bytes]
) -> tuple[list[str], list[UUID], list[str | None]]:
    arrivals = [owners[hash_] for hash_ in hashes]
    return (
        [arrival.account.tenant_id for arrival in arrivals],
        [arrival.account.id for arrival in arrivals],
        [arrival.item.reason if isinstance(arrival.item, Ignored) else None for arrival in arrivals],
    )


def _new(arrival: _Arrival) -> _New:
    account, item = arrival.account, arrival.item
    assert isinstance(item, Inbound)
    agent_id, text = routed(account.routes, account.agent_id, item)
    message = AcceptedMessage(
        account.tenant_id,
        account.id,
        account.vendor.name,
        agent_id,
        account.pseudonyms.session(item.conversation),
        account.pseudonyms.subject(item.person),
        InboundContent(item.conversation, item.person, item.message, text, item.attachments),
        utcnow(),
        account.pseudonyms.session(item.parent) if item.parent else "",
        item.by_admin,
    )
    return _New(message, arrival.hashes[0], arrival.traceparent)


async def _with_aliases(tx: Tx, messages: Sequence[_New]) -> Sequence[_New]:
    """The messages with the sessions that their conversations had under former ids."""
    keys = sorted({new.message.session_key for new in messages})
    rows = await tx.sql("SELECT session_key, target FROM session_alias WHERE session_key = ANY($1::text[])", keys)
    if not rows:
        return messages
    target = dict(rows)
    return [
        new._replace(
            message=replace(new.message, session_key=target.get(new.message.session_key, new.message.session_key))
        )
        for new in messages
    ]


async def _draw_positions(tx: Tx, messages: Sequence[AcceptedMessage]) -> dict[str, Iterator[int]]:
    """The positions of the messages in their conversations, by session key."""
    last = {message.session_key: message for message in messages}
    counts = Counter(message.session_key for message in messages)
    sessions = sorted(last)
    rows = await tx.sql(
        _COUNT,
        sessions,
        [last[session].tenant_id for session in sessions],
        [last[session].channel_id for session in sessions],
        [last[session].subject_id for session in sessions],
        [counts[session] for session in sessions],
    )
    return {session: iter(range(position - counts[session] + 1, position + 1)) for session, position in rows}


def _record(tx: Tx, message: AcceptedMessage, key: DataKey, position: int) -> None:
    """Appends the fact and publishes its messages, for the tenant of the message."""
    tx.tenant_id = message.tenant_id
    event_id = uuid7()
    content = key.seal(msgspec.json.encode(message.content).decode(), str(event_id), "content")
    fact = MessageTaken(
        message.channel_id,
        message.channel_type,
        message.agent_id,
        message.subject_id,
        content,
        message.received_at,
        message.by_admin,
    )
    tx.append(CONVERSATION.stream(message.session_key), fact, event_id=event_id)
    item = FetchAttachments(event_id, message.session_key, position, message.parent_session_key)
    if message.content.attachments:
        tx.enqueue(FETCHES, lane=message.session_key, item=item, item_id=event_id)
    else:
        publish(tx, item, fact, message.content, message.content.text)
