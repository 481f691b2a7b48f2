"""Verified messages on their way into their conversations: position, fact and outbox rows in one transaction."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

import msgspec
from msgspec.structs import replace

from infra.clock import uuid7
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Subject, SubjectKeys
from services.channel.domain import part_id
from services.channel.events import InboundContent, MessageTaken
from services.channel.files.attachments import FETCHES, FetchAttachments, publish
from services.channel.publishing import CONVERSATION

# After so many messages other work of the process gets its turn: webhook calls must not wait for all of a batch.
LUMP = 50

# Counts the messages of each conversation. The rows stay locked until the transaction ends, so no other transaction
# gets these or later positions before. Sorted by session key, as every transaction locks them.
_COUNT = """
    INSERT INTO conversation AS c (session_key, tenant_id, channel_id, subject_id, position, last_at)
    SELECT n.*, clock_timestamp() FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[], $5::bigint[]) AS n
    ON CONFLICT (session_key) DO UPDATE
    SET subject_id = excluded.subject_id, position = c.position + excluded.position, last_at = excluded.last_at
    RETURNING session_key, position
"""


# Reads only: the sessions that each conversation and its parent had under former ids, who the author was under a former
# id, and the author's key.
_LOOK = """
    SELECT a.target, p.target, s.target, k.subject_id IS NOT NULL, k.wrapped
    FROM unnest((SELECT $1::text[]), $2::text[], $3::text[], $4::text[])
            WITH ORDINALITY AS n(session_key, tenant_id, subject_id, parent, n)
        LEFT JOIN session_alias a ON a.session_key = n.session_key
        LEFT JOIN session_alias p ON p.session_key = n.parent
        LEFT JOIN subject_alias s ON s.subject_id = n.subject_id
        LEFT JOIN subject_key k ON k.tenant_id = n.tenant_id AND k.subject_id = coalesce(s.target, n.subject_id)
    ORDER BY n.n
"""


# Further ids of conversations and persons. The rows are locked in the order of their keys.
_ALSO = """
    WITH n AS (
        SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[])
            AS n(session_key, session, subject_id, subject, tenant_id)
    ), sessions AS (
        INSERT INTO session_alias (session_key, tenant_id, target)
        SELECT session_key, tenant_id, session FROM n WHERE session_key <> '' ORDER BY session_key
        ON CONFLICT DO NOTHING
    )
    INSERT INTO subject_alias (subject_id, tenant_id, target)
    SELECT subject_id, tenant_id, subject FROM n ORDER BY subject_id
    ON CONFLICT DO NOTHING
"""


# Reads only: those of these messages that are the bot's, with their runs.
_BOTS = """
    WITH n AS (
        SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[]) AS n(channel_id, message, part_id)
    )
    SELECT n.channel_id, n.message, d.run_id
    FROM n JOIN delivery d ON d.channel_id = n.channel_id AND d.vendor_message_id = n.message
    UNION ALL
    SELECT n.channel_id, n.message, d.run_id FROM n JOIN delivery d ON d.part_ids && ARRAY[n.part_id]
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
    """By PostgreSQL's clock, once it is in a conversation: the agent compares it with the time of its questions."""
    parent_session_key: str = ""
    """The session of the conversation that this one branched off from; empty if there is none."""
    by_admin: bool = False
    approvers: tuple[str, ...] = ()
    event_id: UUID = msgspec.field(default_factory=uuid7)
    """Of its fact. Rows from before this field was added have none."""
    also_session_key: str = ""
    """Of a further id of the conversation and its author, as `Inbound.also`."""
    also_subject_id: str = ""
    quotes: str = ""
    """The vendor's id of the message that it quotes, as `Inbound.quotes`; empty outside of groups."""
    root: str = ""
    """As `Inbound.root`."""
    thread_run_id: UUID | None = None
    """The run whose message `root` is. Known once the message is in its conversation."""
    album: bytes = b""
    """Dedupe hash of the album with which alone it is for the bot; empty: it is for the bot."""
    agent_album: bytes = b""
    """Dedupe hash of the album whose other parts may name the agent by a command; empty: `agent_id` counts."""


class UniqueMessage(NamedTuple):
    """A message that is not a repeat."""

    message: AcceptedMessage
    hash: bytes
    """The first of its dedupe hashes."""
    traceparent: str | None
    """Of its webhook call."""


async def store(tx: Tx, subjects: SubjectKeys, messages: Sequence[UniqueMessage]) -> None:
    """Stores messages in their conversations. Messages of erased persons are dropped here.

    Locks, each kind in the order of its keys: subject keys, conversations, streams.
    """
    if not messages:
        return
    messages, keys = await _look(tx, subjects, messages)
    kept = [(new, key) for new in messages if (key := keys[new.message.tenant_id, new.message.subject_id])]
    if len(kept) < len(messages):
        await tx.sql(
            "UPDATE inbound_seen SET ignored = 'the author was erased' WHERE hash = ANY($1::bytea[])",
            sorted({new.hash for new in messages} - {new.hash for new, _ in kept}),
        )
    positions = await _draw_positions(tx, [new.message for new, _ in kept])
    for number, (new, key) in enumerate(kept, 1):
        if number % LUMP == 0:
            await asyncio.sleep(0)
        # For its tenant, and in the trace of its call.
        tx.tenant_id = new.message.tenant_id
        tx.carrier = {"traceparent": new.traceparent} if new.traceparent else {}
        _record(tx, new.message, key, next(positions[new.message.session_key]))


async def _look(
    tx: Tx, subjects: SubjectKeys, messages: Sequence[UniqueMessage]
) -> tuple[Sequence[UniqueMessage], Mapping[Subject, DataKey | None]]:
    """Returns the messages, with the sessions that they and their parents had under former ids, and their authors'
    keys, made if they do not exist."""
    rows = await tx.sql(
        _LOOK,
        [new.message.session_key for new in messages],
        [new.message.tenant_id for new in messages],
        [new.message.subject_id for new in messages],
        [new.message.parent_session_key for new in messages],
    )
    found: list[UniqueMessage] = []
    keys: dict[Subject, DataKey | None] = {}
    unknown: set[Subject] = set()
    for new, (session, parent, person, has_key, wrapped) in zip(messages, rows, strict=True):
        if session or parent or person:
            message = replace(
                new.message,
                session_key=session or new.message.session_key,
                parent_session_key=parent or new.message.parent_session_key,
                subject_id=person or new.message.subject_id,
            )
            new = new._replace(message=message)
        found.append(new)
        subject = new.message.tenant_id, new.message.subject_id
        if not has_key:
            unknown.add(subject)
        elif subject not in keys:
            keys[subject] = subjects.opened(subject, wrapped)
    found = await _with_bots_messages(tx, found)
    if also := [new.message for new in found if new.message.also_subject_id]:
        await tx.sql(
            _ALSO,
            [message.also_session_key for message in also],
            [message.session_key for message in also],
            [message.also_subject_id for message in also],
            [message.subject_id for message in also],
            [message.tenant_id for message in also],
        )
    return found, keys | await subjects.keys(tx, unknown) if unknown else keys


async def _with_bots_messages(tx: Tx, messages: list[UniqueMessage]) -> list[UniqueMessage]:
    """The messages. It is looked up if they quote the bot, and if their threads began at its messages."""
    about = [
        (new.message.channel_id, id_)
        for new in messages
        for id_ in (new.message.quotes, new.message.root)
        # No message has NUL in its id, and the database refuses it.
        if id_ and "\0" not in id_
    ]
    if not about:
        return messages
    rows = await tx.sql(
        _BOTS,
        [channel_id for channel_id, _ in about],
        [id_ for _, id_ in about],
        [part_id(*one) for one in about],
    )
    runs = {(channel_id, id_): run_id and UUID(str(run_id)) for channel_id, id_, run_id in rows}

    def known(message: AcceptedMessage) -> AcceptedMessage:
        if message.quotes and (message.channel_id, message.quotes) not in runs:
            message = replace(message, content=replace(message.content, for_others=True))
        return replace(message, thread_run_id=runs.get((message.channel_id, message.root)))

    return [new._replace(message=known(new.message)) for new in messages]


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
    """Appends the fact and publishes its messages."""
    event_id = message.event_id
    content = key.seal(msgspec.json.encode(message.content).decode(), str(event_id), "content")
    fact = MessageTaken(
        message.channel_id,
        message.channel_type,
        message.agent_id,
        message.subject_id,
        content,
        message.received_at,
        message.by_admin,
        message.approvers,
    )
    tx.append(CONVERSATION.stream(message.session_key), fact, event_id=event_id)
    item = FetchAttachments(
        event_id,
        message.session_key,
        position,
        message.parent_session_key,
        message.thread_run_id,
        message.content.in_album,
    )
    if message.content.attachments:
        tx.enqueue(FETCHES, lane=message.session_key, item=item, item_id=event_id)
    else:
        publish(tx, item, fact, message.content, message.content.text)
