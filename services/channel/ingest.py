"""What verified webhooks brought, stored: seen, fact, and what the agent is told.

Calls that are under way at the same time share a transaction: while one group commits the next one gathers. Alone, a
call is a group of one and waits for nobody.
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
from services.channel.domain import seen_as
from services.channel.events import Heard, MessageTaken
from services.channel.publishing import CONVERSATION
from services.channel.vendors.base import Ignored, Inbound

# Calls in one transaction.
MAX_GROUP = 200
# Longer than any vendor goes on trying: WhatsApp, the longest, does so for seven days.
KEEP_SEEN = timedelta(days=30)
# Little and often: one call waits for it.
CLEANING_SECONDS = 1.0
CLEANING_ROWS = 2_000

_log = get_logger("channel.ingest")


class _Arrival(NamedTuple):
    """One item of a call, under the hashes by which it is known."""

    account: Account
    item: Inbound | Ignored
    hashes: list[bytes]


class _Heard(NamedTuple):
    """A person's message that is new."""

    account: Account
    item: Inbound
    hashes: list[bytes]
    context: Context
    session_key: str
    subject: tuple[str, str]


class _Call(NamedTuple):
    """One webhook call; `context` is that of its request, with its trace."""

    arrivals: list[_Arrival]
    context: Context


class Ingest:
    """Takes what webhooks brought."""

    def __init__(self, database: Database, subjects: SubjectKeys) -> None:
        self._database = database
        self._subjects = subjects
        # One group after the other: messages of a conversation are stored in the order of their arrival.
        self._commits = GroupCommit(self._commit, largest=MAX_GROUP)
        self._cleaned_at = time.monotonic()

    async def take(self, account: Account, items: Sequence[Inbound | Ignored]) -> None:
        """Returns once all of it is committed; what was seen before changes nothing.

        Raises what the database raises: then nothing is stored, and the vendor has to send it again.
        """
        arrivals = [
            _Arrival(account, _checked(account, item), [seen_as(account.id, id_) for id_ in item.ids]) for item in items
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
        """Each kind of row in one statement, and each sorted: groups of several processes wait for each other in one
        order, never in a circle."""
        new = await self._note(tx, [arrival for call in group for arrival in call.arrivals])
        heard = [
            _Heard(
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
        if not heard:
            return
        keys = await self._subjects.keys(tx, {one.subject for one in heard})
        if erased := [one for one in heard if keys[one.subject] is None]:
            await tx.sql(
                "UPDATE inbound_seen SET ignored = 'of an erased person' WHERE hash = ANY($1::bytea[])",
                [hash_ for one in erased for hash_ in one.hashes],
            )
        kept = [(one, key) for one in heard if (key := keys[one.subject])]
        positions = await _note_conversations(tx, [one for one, _ in kept])
        for one, key in kept:
            one.context.run(_record, tx, one, key, next(positions[one.session_key]))

    async def _note(self, tx: Tx, arrivals: Sequence[_Arrival]) -> set[int]:
        """Notes what is seen for the first time; returns which of the arrivals are (by identity). Waits for another
        transaction that notes the same."""
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
            # Under any of its names it is a repeat from here on, in this very group too.
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
            _log.warning("what was seen long ago is not cleared now", error=describe(error))


async def _note_conversations(tx: Tx, heard: Sequence[_Heard]) -> dict[str, Iterator[int]]:
    """Counts the messages. Returns by session which positions these have; nobody else gets them or later ones before
    the transaction ends."""
    last = {one.session_key: one for one in heard}
    counts = Counter(one.session_key for one in heard)
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


def _record(tx: Tx, heard: _Heard, key: DataKey, position: int) -> None:
    """The fact and what is told of it, for its own tenant and in its own trace."""
    account, item = heard.account, heard.item
    tx.tenant_id = account.tenant_id
    event_id, received_at = uuid7(), utcnow()
    content = msgspec.json.encode(Heard(item.conversation, item.person, item.message, item.text)).decode()
    tx.append(
        CONVERSATION.stream(heard.session_key),
        MessageTaken(
            account.id,
            account.vendor.name,
            account.agent_id,
            heard.subject[1],
            key.seal(content, str(event_id), "content"),
            received_at,
        ),
        event_id=event_id,
    )
    message = MessageReceived(
        channel_id=account.id,
        channel_type=account.vendor.name,
        agent_id=account.agent_id,
        session_key=heard.session_key,
        conversation_id=item.conversation,
        subject_id=heard.subject[1],
        vendor_message_id=item.message,
        text=item.text,
        received_at=received_at,
        position=position,
    )
    tx.publish(CHANNEL_EVENTS, message, key=heard.session_key)
    tx.send(CHANNEL_INBOUND[account.vendor.name], message)


def _checked(account: Account, item: Inbound | Ignored) -> Inbound | Ignored:
    """What this account takes of it. NUL has no meaning in a text and is left out, for stores refuse it."""
    if isinstance(item, Ignored):
        return item
    if not account.enabled:
        return Ignored(item.ids, "the channel is disabled")
    text = item.text.replace("\0", "")
    return item._replace(text=text) if text.strip() else Ignored(item.ids, "an empty text")
