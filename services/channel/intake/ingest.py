"""Accepts the items of verified webhook calls. The answer 200 follows the commit that this module makes.

Calls that wait at the same moment are a group. Under load a group is accepted by one statement: dedupe rows, and a row
in the table ``accepted`` for each new message; `services.channel.intake.drainer` moves these messages into their
conversations. While few calls arrive and no accepted row waits, a group is stored in its conversations directly, so
that a message needs one commit. Decision 13 has the reasons.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from uuid import UUID

import msgspec
from msgspec.structs import replace

from infra.clock import utcnow, uuid7
from infra.errors import TooLarge, Transient
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.outgoing.shares import Shares
from infra.postgres.database import Database
from infra.postgres.group_commit import GroupCommit
from infra.postgres.tx import MAX_MESSAGE_BYTES, Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from services.channel.accounts.routing import Route, is_for_the_bot, routed
from services.channel.accounts.store import AccountSecrets, ChannelAccount
from services.channel.domain import dedupe_hash
from services.channel.events import InboundContent
from services.channel.intake import changes
from services.channel.intake.conversations import AcceptedMessage, UniqueMessage, store
from services.channel.intake.receipts import record
from services.channel.vendors.items import Change, Edited, Ignored, Inbound, Item, Moved, Reacted, Receipt

ACCEPTED = SealedColumn("accepted", "sealed", "accepted", ("encode(hash, 'hex')",))
OTHER_FIELDS_BYTES = 2_000
"""Of a MessageReceived, apart from the texts of the vendor: ids, times and names of fields."""
# The most items in one statement; a call with more is alone in its statement.
MAX_GROUP = 500
# Up to this many items are stored directly. More at once mean load, and under load acceptance comes first.
MAX_DIRECT = 8
# Of one call. WhatsApp sends at most 1,000.
MAX_ITEMS = 2_000
# Bytes of the calls that wait, with so many for each item beside its call's body. More are refused with 503, so that
# memory stays bounded while the database is slow; a tenant has a share, which alone is a half.
MAX_WAITING = 32 * 1024 * 1024
ITEM_BYTES = 1_000
# One part of an album has its text, which may mention the bot or name an agent by a command. In a group in which only
# mentions are answered, and with routes by command, the other parts wait for it so long: all come at the same moment,
# and in any order.
ALBUM_WAITS = timedelta(seconds=1.5)
# While accepted messages of a tenant wait longer than this for their conversations, its calls are refused with 503: the
# vendor sends them again, and the table stays bounded.
MAX_BACKLOG = timedelta(minutes=5)

# Inserts dedupe rows in the order of their hashes, so that concurrent transactions wait for each other in one order,
# and waits for a transaction that inserts the same hash. It inserts nothing while accepted rows wait: a message stored
# directly would overtake them. Rows that a drainer is deleting still count, until it has committed.
_NOTE = """
    WITH idle AS (
        SELECT NOT EXISTS (SELECT FROM accepted WHERE retry_at IS NULL) AS idle
    ), fresh AS (
        INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored, event_id)
        SELECT n.* FROM unnest($1::bytea[], $2::text[], $3::uuid[], $4::text[], $5::uuid[]) AS n, idle WHERE idle.idle
        ON CONFLICT DO NOTHING
        RETURNING hash
    )
    SELECT idle.idle, clock_timestamp(), fresh.hash FROM idle LEFT JOIN fresh ON true
"""

# Inserts dedupe rows as above, and an accepted row for each message that has all its hashes for itself: the row of its
# first hash has the sealed message. Positions are drawn in the order of the messages.
_ACCEPT = """
    WITH n AS (
        SELECT *
        FROM unnest(
            $1::bytea[], $2::text[], $3::uuid[], $4::text[], $5::uuid[], $6::int[], $7::bytea[], $8::text[],
            $9::interval[]
        ) AS n(hash, tenant_id, channel_id, ignored, event_id, message, sealed, traceparent, waits)
    ), fresh AS (
        INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored, event_id)
        SELECT hash, tenant_id, channel_id, ignored, event_id FROM n
        ON CONFLICT DO NOTHING
        RETURNING hash
    ), new AS (
        SELECT message FROM n LEFT JOIN fresh USING (hash) GROUP BY message HAVING count(*) = count(fresh.hash)
    )
    INSERT INTO accepted (tenant_id, channel_id, hash, sealed, traceparent, retry_at)
    SELECT tenant_id, channel_id, hash, sealed, traceparent, clock_timestamp() + waits
    FROM n JOIN new USING (message)
    WHERE sealed IS NOT NULL
    ORDER BY message
"""


def _alias(table: str, column: str) -> str:
    """The new id leads to the session, or the subject, of the old one, which may be that of an older one."""
    return f"""
        INSERT INTO {table} ({column}, tenant_id, target)
        SELECT $1, $2, coalesce((SELECT target FROM {table} WHERE {column} = $3), $3)
        ON CONFLICT ({column}) DO UPDATE SET target = excluded.target
    """


_ALIAS_SESSION = _alias("session_alias", "session_key")
_ALIAS_SUBJECT = _alias("subject_alias", "subject_id")
_MOVED = "the conversation got another id"
_ALBUM = "the id of an album that is for the bot"
_AGENT = "the agent of an album"
_EFFECTS = (Moved, Receipt)


class _Arrival(msgspec.Struct):
    """One item of a call, with its dedupe hashes."""

    account: ChannelAccount
    item: Inbound | Ignored
    hashes: list[bytes]
    traceparent: str | None
    event_id: UUID
    """Of the fact if the item is a message; the agent's id if the item is `_AGENT`."""
    album: bytes = b""
    """Dedupe hash of the album with which alone the message is for the bot; empty: it is for the bot."""
    agent_album: bytes = b""
    """As in `AcceptedMessage`."""


class Ingest:
    """The intake of one process."""

    def __init__(self, database: Database, cipher: Cipher, subjects: SubjectKeys) -> None:
        self.database = database
        self.cipher = cipher
        self.subjects = subjects
        self._secrets = AccountSecrets(cipher)
        # One group after the other: messages of a conversation are stored in the order of their arrival.
        self._commits = GroupCommit(self._commit, largest=MAX_GROUP, size=len)
        self._room = Shares(MAX_WAITING)
        self.accepted = asyncio.Event()
        """Set after accepted rows were written, so that the drainer looks for them."""
        self.is_behind = False
        """Rows that this process accepted wait for its drainer, so a group need not ask whether it may be stored
        directly. Only a hint: the statement decides, and other processes accept rows, too."""
        self.backlog: Mapping[str, timedelta] = {}
        """The time that a tenant's message drained last had waited; without the tenants whose messages are drained."""

    def accept(
        self,
        account: ChannelAccount,
        items: Sequence[Item],
        traceparent: str | None = None,
        size: int = 0,
    ) -> asyncio.Future[None]:
        """Begins to commit the items. The result is done once all are committed; repeats change nothing.

        Raises Transient while too many calls or accepted messages of the tenant wait, TooLarge for too many items or a
        message that the buses could not carry. The result has the error of the database. In all cases nothing is
        stored, and the vendor has to send the call again.
        traceparent: of the span of the call. size: bytes of its body.
        """
        tenant = account.tenant_id
        if len(items) > MAX_ITEMS:
            raise TooLarge(f"body: has {len(items)} events; must have at most {MAX_ITEMS}")
        if self.backlog and self.backlog.get(tenant, timedelta(0)) > MAX_BACKLOG:
            raise Transient("accepted messages wait too long for their conversations")
        size += ITEM_BYTES * len(items)
        if not self._room.take_now(tenant, size):
            raise Transient("too many webhook calls wait to be stored")
        try:
            accepted = self._begin(account, items, traceparent)
        except Exception:
            self._room.give(tenant, size)
            raise
        accepted.add_done_callback(lambda _: self._room.give(tenant, size))
        return accepted

    def _begin(self, account: ChannelAccount, items: Sequence[Item], traceparent: str | None) -> asyncio.Future[None]:
        arrivals, changed = [], []
        has_effects = False
        for item in items:
            checked = _checked(account, item)
            if isinstance(checked, Change):
                changed.append(checked)
                continue
            if isinstance(item, _EFFECTS):
                has_effects = True
            album = b""
            if isinstance(checked, Inbound) and checked.album and account.groups != "all":
                album = dedupe_hash(account.id, checked.album)
                if is_for_the_bot(account.groups, checked):
                    arrivals.append(_Arrival(account, Ignored((checked.album,), _ALBUM), [album], traceparent, uuid7()))
                    album = b""
            agent_album = b""
            if isinstance(checked, Inbound) and checked.album and any(route.command for route in account.routes):
                id_ = f"{checked.album}/agent"
                agent_album = dedupe_hash(account.id, id_)
                if agent_id := _commanded(account, checked):
                    arrivals.append(_Arrival(account, Ignored((id_,), _AGENT), [agent_album], traceparent, agent_id))
                    agent_album = b""
            hashes = [dedupe_hash(account.id, id_) for id_ in checked.ids]
            arrivals.append(_Arrival(account, checked, hashes, traceparent, uuid7(), album, agent_album))
        if changed or has_effects:
            return asyncio.create_task(self._apply_and_accept(account, items, changed, arrivals, traceparent))
        return self._commits.submit(arrivals)

    async def _apply_and_accept(
        self,
        account: ChannelAccount,
        items: Sequence[Item],
        changed: Sequence[Change],
        arrivals: list[_Arrival],
        traceparent: str | None,
    ) -> None:
        with telemetry.continued(traceparent):
            if receipts := [item for item in items if isinstance(item, Receipt)]:
                await record(self.database, account, receipts)
            for item in items:
                if isinstance(item, Moved):
                    await self._move(account, item)
            if changed:
                await changes.accept(self.database, self.subjects, account, changed)
        await self._commits.write(arrivals)

    async def _move(self, account: ChannelAccount, moved: Moved) -> None:
        """From now on, messages with the new id enter the session of the old one and go to its agent. A repeat changes
        nothing."""
        # A session and a subject that no other id leads to.
        unused = f"{moved.old} until {moved.ids[0]}"

        async def work(tx: Tx) -> None:
            rows = await tx.sql(
                """
                INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored) VALUES ($1, $2, $3, $4)
                ON CONFLICT DO NOTHING
                RETURNING hash
                """,
                dedupe_hash(account.id, moved.ids[0]),
                account.tenant_id,
                account.id,
                _MOVED,
            )
            if not rows:
                return
            for statement, pseudonym in (
                (_ALIAS_SESSION, account.pseudonyms.session),
                *([(_ALIAS_SUBJECT, account.pseudonyms.subject)] if moved.is_person else []),
            ):
                await tx.sql(statement, pseudonym(moved.new), account.tenant_id, pseudonym(moved.old))
                if moved.is_person:
                    await tx.sql(statement, pseudonym(moved.old), account.tenant_id, pseudonym(unused))
            # Locks the account: a change of its routes must not get lost.
            for (sealed,) in await tx.sql("SELECT routes FROM account WHERE id = $1 FOR UPDATE", account.id):
                routes = self._secrets.routes(account.id, sealed) if sealed else ()
                if any(route.conversation_id == moved.old for route in routes):
                    sealed = self._secrets.seal_routes(account.id, [_moved(route, moved) for route in routes])
                    await tx.sql("UPDATE account SET routes = $2 WHERE id = $1", account.id, sealed)

        await self.database.run(work)

    async def _commit(self, group: Sequence[list[_Arrival]]) -> Mapping[int, Exception]:
        arrivals = [arrival for call in group for arrival in call]
        waits = any(arrival.album or arrival.agent_album for arrival in arrivals)
        if len(arrivals) > MAX_DIRECT or waits or self.is_behind or not await self._store_directly(arrivals):
            await self._accept(arrivals)
        if waits:
            asyncio.get_running_loop().call_later(ALBUM_WAITS.total_seconds(), self.accepted.set)
        return {}

    async def _store_directly(self, arrivals: Sequence[_Arrival]) -> bool:
        """Stores the messages in their conversations. Returns False, and stores nothing, while accepted rows wait."""
        owners = _owners(arrivals)
        hashes = sorted(owners)

        async def work(tx: Tx) -> bool:
            rows = await tx.sql(_NOTE, hashes, *_seen_columns(owners, hashes))
            if not rows[0][0]:
                return False
            fresh = {hash_ for *_, hash_ in rows}
            new = [one for one in _first(arrivals, owners) if fresh.issuperset(one.hashes)]
            await store(
                tx,
                self.subjects,
                [UniqueMessage(_message(one, rows[0][1]), one.hashes[0], one.traceparent) for one in new],
            )
            return True

        return await self.database.run(work)

    async def _accept(self, arrivals: Sequence[_Arrival]) -> None:
        owners = _owners(arrivals)
        hashes = sorted(owners)
        first = _first(arrivals, owners)
        sealed = self._sealed(first)
        numbers = {id(arrival): number for number, arrival in enumerate(first)}
        failpoint("before_accept")
        await self.database.autocommit(
            _ACCEPT,
            hashes,
            *_seen_columns(owners, hashes),
            # Only a message with all its hashes for itself has a number. Hashes without a number are stored, too.
            [numbers.get(id(owners[hash_])) for hash_ in hashes],
            [sealed.get(hash_) for hash_ in hashes],
            [owners[hash_].traceparent for hash_ in hashes],
            [ALBUM_WAITS if owners[hash_].album or owners[hash_].agent_album else None for hash_ in hashes],
        )
        failpoint("after_accept")
        self.is_behind = True
        self.accepted.set()

    def _sealed(self, arrivals: Sequence[_Arrival]) -> dict[bytes, bytes]:
        """The sealed messages, by their first hash."""
        now = utcnow()
        contents = [msgspec.json.encode(_message(arrival, now)) for arrival in arrivals]
        return {
            hash_: self.cipher.seal(content, "accepted", hash_.hex())
            for hash_, content in zip([arrival.hashes[0] for arrival in arrivals], contents, strict=True)
        }


def ingest(runtime: Runtime) -> Ingest:
    """The intake of this process: the webhooks and the drainer share it."""
    return _ingest(runtime.worker, runtime.cipher)


@cache
def _ingest(database: Database, cipher: Cipher) -> Ingest:
    return Ingest(database, cipher, SubjectKeys(cipher))


def _commanded(account: ChannelAccount, item: Inbound) -> UUID | None:
    """The agent that the words of the message choose; None: they choose no other than the one without them."""
    chosen, usual = (routed(account.routes, account.agent_id, one)[0] for one in (item, item._replace(text="")))
    return chosen if chosen != usual else None


def _moved(route: Route, moved: Moved) -> Route:
    return replace(route, conversation_id=moved.new) if route.conversation_id == moved.old else route


def _checked(account: ChannelAccount, item: Item) -> Inbound | Change | Ignored:
    """Ignores messages and reactions of a disabled account, and messages that are not for the bot.

    Raises TooLarge as `_checked_message`.
    """
    match item:
        case Inbound() | Reacted() if not account.enabled:
            # Edits and deletions count: they are about stored messages, and the vendor does not send them again.
            return Ignored(item.ids[:1], "the channel is paused")
        case Inbound():
            return _checked_message(account, item)
        case Moved():
            return Ignored(item.ids, _MOVED)
        case Receipt():
            return Ignored(item.ids, f"a receipt: {item.state}")
        case Edited():
            message = _checked_message(account, item.message)
            if isinstance(message, Ignored):
                return Ignored(item.ids, f"an edit: {message.reason}")
            return item._replace(message=message)
        case Reacted() if not item.person:
            return Ignored(item.ids, "a reaction without an author")
    return item


def _checked_message(account: ChannelAccount, item: Inbound) -> Inbound | Ignored:
    """Ignores empty texts. Removes NUL, which databases refuse.

    An ignored message is known under its first id only: Slack tells a mention in a second event about the same message.
    Raises TooLarge if the buses could not carry the message: the vendor must not get a 200 for it.
    """
    if not item.conversation or not item.person:
        return Ignored(item.ids[:1], "without a conversation or an author")
    if not is_for_the_bot(account.groups, item) and not item.album:
        return Ignored(item.ids[:1], f"a message of a group; only {account.groups} are answered")
    text = item.text.replace("\0", "")
    most = MAX_MESSAGE_BYTES - OTHER_FIELDS_BYTES
    words = item.words.replace("\0", "")
    # A character is at most six bytes in JSON.
    if item.attachments or 6 * (len(text) + len(words) + len(item.conversation) + len(item.message)) > most:
        size = len(msgspec.json.encode((text, words, item.conversation, item.message, item.attachments)))
        if size > most:
            raise TooLarge(f"message: has {size} bytes; must have at most {most}")
    if not text.strip() and not item.attachments:
        return Ignored(item.ids[:1], "the text is empty")
    return item if (text, words) == (item.text, item.words) else item._replace(text=text, words=words)


def _owners(arrivals: Sequence[_Arrival]) -> dict[bytes, _Arrival]:
    """The first arrival of the group with each hash; later ones are repeats."""
    return {hash_: arrival for arrival in reversed(arrivals) for hash_ in arrival.hashes}


def _first(arrivals: Sequence[_Arrival], owners: Mapping[bytes, _Arrival]) -> list[_Arrival]:
    """The messages that repeat no earlier arrival of the group under any of their hashes."""
    return [
        arrival
        for arrival in arrivals
        if isinstance(arrival.item, Inbound) and all([owners[hash_] is arrival for hash_ in arrival.hashes])
    ]


def _seen_columns(
    owners: Mapping[bytes, _Arrival], hashes: Sequence[bytes]
) -> tuple[list[str], list[UUID], list[str | None], list[UUID]]:
    arrivals = [owners[hash_] for hash_ in hashes]
    return (
        [arrival.account.tenant_id for arrival in arrivals],
        [arrival.account.id for arrival in arrivals],
        [arrival.item.reason if isinstance(arrival.item, Ignored) else None for arrival in arrivals],
        [arrival.event_id for arrival in arrivals],
    )


def _message(arrival: _Arrival, now: datetime) -> AcceptedMessage:
    account, item = arrival.account, arrival.item
    assert isinstance(item, Inbound)
    agent_id, text = routed(account.routes, account.agent_id, item)
    return AcceptedMessage(
        account.tenant_id,
        account.id,
        account.vendor.name,
        agent_id,
        account.pseudonyms.session(item.conversation),
        account.pseudonyms.subject(item.person),
        InboundContent(
            item.conversation,
            item.person,
            item.message,
            text,
            item.attachments,
            item.words,
            item.for_others,
            item.in_album,
        ),
        now,
        account.pseudonyms.session(item.parent) if item.parent else "",
        item.by_admin,
        account.approvers,
        arrival.event_id,
        account.pseudonyms.session(item.also) if item.also and not item.in_group else "",
        account.pseudonyms.subject(item.also) if item.also else "",
        item.quotes if item.in_group else "",
        item.root,
        album=arrival.album,
        agent_album=arrival.agent_album,
    )
