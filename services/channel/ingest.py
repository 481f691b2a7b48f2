"""Stores the items of verified webhook calls: the dedupe row, the fact, and the messages to the agent.

Concurrent calls share a transaction: while one group commits, the next one gathers. A single call is a group of one
and does not wait.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import Context, copy_context
from datetime import timedelta
from typing import NamedTuple

import msgspec

from infra.clock import utcnow, uuid7
from infra.errors import describe
from infra.observe.logs import get_logger
from infra.postgres.group_commit import GroupCommit
from infra.postgres.tx import Database, Tx
from infra.security.crypto import DataKey
from infra.security.subjects import SubjectKeys
from protos.catalog import CHANNEL_EVENTS, CHANNEL_INBOUND
from protos.messages.channel import MessageReceived
from services.channel.accounts import Account
from services.channel.domain import dedupe_hash
from services.channel.events import InboundContent, MessageTaken
from services.channel.publishing import CONVERSATION
from services.channel.vendors.base import Ignored, Inbound

# Calls in one transaction.
MAX_GROUP = 200
# Longer than the retry horizon of every vendor. WhatsApp has the longest: seven days.
KEEP_SEEN = timedelta(days=30)
# Few rows at a time, because one call waits for the deletion.
CLEANING_SECONDS = 1.0
CLEANING_ROWS = 2_000

_log = get_logger("channel.ingest")


class _Arrival(NamedTuple):
    """One item of a call, with its dedupe hashes."""

    account: Account
    item: Inbound | Ignored
    hashes: list[bytes]


class _NewMessage(NamedTuple):
    """A person's message that is not a repeat."""

    account: Account
    item: Inbound
    hashes: list[bytes]
    context: Context
    session_key: str
    subject: tuple[str, str]


class _Call(NamedTuple):
    """One webhook call. `context`: the context of its request, with its trace."""

    arrivals: list[_Arrival]
    context: Context


class Ingest:
    """Accepts the items of webhook calls."""

    def __init__(self, database: Database, subjects: SubjectKeys) -> None:
        self._database = database
        self._subjects = subjects
        # One group after the other: messages of a conversation are stored in the order of their arrival.
        self._commits = GroupCommit(self._commit, largest=MAX_GROUP)
        self._cleaned_at = time.monotonic()

    async def accept(self, account: Account, items: Sequence[Inbound | Ignored]) -> None:
        """Returns once all items are committed. Repeats change nothing.

        Raises the error of the database; then nothing is stored, and the vendor has to send the call again.
        """
        arrivals = [
            _Arrival(account, _checked(account, item), [dedupe_hash(account.id, id_) for id_ in item.ids])
            for item in items
        ]
        await self._commits.write(_Call(arrivals, copy_context()))
        if time.monotonic() - self._cleaned_at > CLEANING_SECONDS:
            self._cleaned_at = time.monotonic()
            await self._clean()

    async def _commit(self, group: Sequence[_Call]) -> Mapping[int, Exception]:
        async def work(tx: Tx) -> None:
            await self._store(tx, group)

        await self._database.run(work)
        return {}

    async def _store(self, tx: Tx, group: Sequence[_Call]) -> None:
        """Writes each kind of row in one sorted statement, so that groups of several processes lock rows in the same
        order and cannot deadlock."""
        new = await self._note(tx, [arrival for call in group for arrival in call.arrivals])
        messages = [
            _NewMessage(
                arrival.account,
                arrival.item,
                arrival.hashes,
                call.context,
                arrival.account.pseudonyms.session(arrival.item.conversation),
                (arrival.account.tenant_id, arrival.account.pseudonyms.subject(arrival.item.person)),
            )
            for call in group
            for arrival in call.arrivals
            if id(arrival) in new and isinstance(arrival.item, Inbound)
        ]
        if not messages:
            return
        keys = await self._subjects.keys(tx, {one.subject for one in messages})
        if erased := [one for one in messages if keys[one.subject] is None]:
            await tx.sql(
                "UPDATE inbound_seen SET ignored = 'the author was erased' WHERE hash = ANY($1::bytea[])",
                [hash_ for one in erased for hash_ in one.hashes],
            )
        kept = [(one, key) for one in messages if (key := keys[one.subject])]
        positions = await _note_conversations(tx, [one for one, _ in kept])
        for one, key in kept:
            one.context.run(_record, tx, one, key, next(positions[one.session_key]))

    async def _note(self, tx: Tx, arrivals: Sequence[_Arrival]) -> set[int]:
        """Inserts the dedupe rows and returns the identities of the arrivals that are new. Waits for another
        transaction that inserts the same rows."""
        rows = {
            hash_: (arrival.account, arrival.item.reason if isinstance(arrival.item, Ignored) else None)
            for arrival in reversed(arrivals)
            for hash_ in arrival.hashes
        }
        hashes = sorted(rows)
        fresh = {
            bytes(hash_)
            for (hash_,) in await tx.sql(
                "INSERT INTO inbound_seen (hash, tenant_id, channel_id, ignored) "
                "SELECT * FROM unnest($1::bytea[], $2::text[], $3::uuid[], $4::text[]) "
                "ON CONFLICT DO NOTHING RETURNING hash",
                hashes,
                [rows[hash_][0].tenant_id for hash_ in hashes],
                [rows[hash_][0].id for hash_ in hashes],
                [rows[hash_][1] for hash_ in hashes],
            )
        }
        new = set()
        for arrival in arrivals:
            if fresh.issuperset(arrival.hashes):
                new.add(id(arrival))
            # From here on it is a repeat under each of its ids, also within this group.
            fresh.difference_update(arrival.hashes)
        return new

    async def _clean(self) -> None:
        try:
            async with self._database.begin() as tx:
                await tx.sql(
                    "DELETE FROM inbound_seen WHERE hash IN "
                    "(SELECT hash FROM inbound_seen WHERE seen_at < now() - $1::interval LIMIT $2)",
                    KEEP_SEEN,
                    CLEANING_ROWS,
                )
        except Exception as error:
            _log.warning(f"could not prune inbound_seen; will retry in {CLEANING_SECONDS:g} s", error=describe(error))


async def _note_conversations(tx: Tx, messages: Sequence[_NewMessage]) -> dict[str, Iterator[int]]:
    """Assigns positions to the messages and returns them by session. The rows stay locked until the transaction ends,
    so no other transaction gets these or later positions before."""
    last = {one.session_key: one for one in messages}
    counts = Counter(one.session_key for one in messages)
    sessions = sorted(last)
    rows = await tx.sql(
        "INSERT INTO conversation AS c (session_key, tenant_id, channel_id, subject_id, position) "
        "SELECT * FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[], $5::bigint[]) "
        "ON CONFLICT (session_key) DO UPDATE SET subject_id = excluded.subject_id, "
        "position = c.position + excluded.position RETURNING session_key, position",
        sessions,
        [last[session].account.tenant_id for session in sessions],
        [last[session].account.id for session in sessions],
        [last[session].subject[1] for session in sessions],
        [counts[session] for session in sessions],
    )
    return {session: iter(range(position - counts[session] + 1, position + 1)) for session, position in rows}


def _record(tx: Tx, new: _NewMessage, key: DataKey, position: int) -> None:
    """Appends the fact and publishes its messages, for the tenant and in the trace of the message."""
    account, item = new.account, new.item
    tx.tenant_id = account.tenant_id
    event_id, received_at = uuid7(), utcnow()
    content = msgspec.json.encode(InboundContent(item.conversation, item.person, item.message, item.text)).decode()
    tx.append(
        CONVERSATION.stream(new.session_key),
        MessageTaken(
            account.id,
            account.vendor.name,
            account.agent_id,
            new.subject[1],
            key.seal(content, str(event_id), "content"),
            received_at,
        ),
        event_id=event_id,
    )
    message = MessageReceived(
        channel_id=account.id,
        channel_type=account.vendor.name,
        agent_id=account.agent_id,
        session_key=new.session_key,
        conversation_id=item.conversation,
        subject_id=new.subject[1],
        vendor_message_id=item.message,
        text=item.text,
        received_at=received_at,
        position=position,
    )
    tx.publish(CHANNEL_EVENTS, message, key=new.session_key)
    tx.send(CHANNEL_INBOUND[account.vendor.name], message)


def _checked(account: Account, item: Inbound | Ignored) -> Inbound | Ignored:
    """Ignores items of a disabled account and empty texts. Removes NUL, which databases refuse."""
    if isinstance(item, Ignored):
        return item
    if not account.enabled:
        return Ignored(item.ids, "the channel is disabled")
    text = item.text.replace("\0", "")
    return item._replace(text=text) if text.strip() else Ignored(item.ids, "the text is empty")
