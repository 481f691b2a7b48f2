"""Edits, deletions and reactions: stored at the message that they are about, and told to the agent.

A call is accepted once each change is an item of a lane. The lane finds the message by the vendor's id, so a change may
come before its message: it waits a while. Changes of one message are taken one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, NamedTuple
from uuid import UUID

import msgspec
from msgspec.structs import replace

from infra.clock import utcnow, uuid7
from infra.errors import NotYet
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.postgres import event_store
from infra.postgres.database import Database
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import SubjectKeys
from protos.catalog import CHANNEL_CHANGES
from protos.messages.channel import MessageChanged
from services.channel.accounts.routing import routed
from services.channel.accounts.store import ChannelAccount
from services.channel.domain import dedupe_hash, part_id
from services.channel.events import (
    InboundContent,
    MessageChange,
    MessageDeleted,
    MessageEdited,
    MessageReacted,
    MessageTaken,
)
from services.channel.files.attachments import (
    FORGOTTEN,
    ForgetDocuments,
    queue_passes,
    sent_id,
)
from services.channel.publishing import CONVERSATION, MESSAGE
from services.channel.vendors.items import Change, Deleted, Edited, Reacted

# How long a change waits for its message each time. A vendor repeats a message that was not accepted within minutes.
_WAITS = tuple(timedelta(seconds=seconds) for seconds in (1, 5, 30, 120, 600))

# Of one reaction. A vendor allows three.
MAX_SIGNS = 20
MAX_SIGN = 100
"""Characters."""


class ChangeItem(msgspec.Struct, frozen=True):
    """A change that was accepted."""

    event_id: UUID
    """Of the fact that is stored."""
    channel_id: UUID
    target: bytes
    """Dedupe hash of the message."""
    seen: bytes
    """Dedupe hash of the change itself."""
    kind: Literal["edited", "deleted", "reacted"] = "deleted"
    order: int = 0
    subject_id: str = ""
    content: bytes = b""
    """As in the fact."""
    mode: Literal["added", "removed", "all"] = "added"
    message: str = ""
    """The vendor's id of the message, by which a delivery is found."""
    session_key: str = ""
    """Of that delivery; empty: any."""

    def fact(self) -> MessageChange:
        match self.kind:
            case "edited":
                return MessageEdited(self.subject_id, self.content, self.order)
            case "deleted":
                return MessageDeleted()
            case "reacted":
                return MessageReacted(self.subject_id, self.content, self.mode, self.order)


# One lane per message.
CHANGES = Lane("changes", ChangeItem)


class _Target(NamedTuple):
    """The message of a change."""

    id: UUID
    taken: MessageTaken | None = None
    """None: the bot's message."""
    session_key: str = ""
    position: int = 0


async def accept(database: Database, subjects: SubjectKeys, account: ChannelAccount, changes: Sequence[Change]) -> None:
    """Stores the changes of one call. Repeats change nothing."""
    hashes = {dedupe_hash(account.id, change.ids[0]): change for change in reversed(changes)}

    async def work(tx: Tx) -> None:
        rows = await tx.sql(
            # In the order of the hashes, as all inserts there.
            """
            INSERT INTO inbound_seen (hash, tenant_id, channel_id)
            SELECT hash, $2, $3 FROM unnest($1::bytea[]) AS n(hash)
            ON CONFLICT DO NOTHING
            RETURNING hash
            """,
            sorted(hashes),
            account.tenant_id,
            account.id,
        )
        fresh = {hash_ for (hash_,) in rows}
        # In the order of the call, which is the reverse of the dictionary's.
        new = [(hash_, change) for hash_, change in reversed(hashes.items()) if hash_ in fresh]
        authors = [account.pseudonyms.subject(_person(one)) for _, one in new if not isinstance(one, Deleted)]
        # Under former ids.
        known = dict(
            await tx.sql("SELECT subject_id, target FROM subject_alias WHERE subject_id = ANY($1::text[])", authors)
            if authors
            else ()
        )
        authors = [known.get(author, author) for author in authors]
        keys = await subjects.keys(tx, [(account.tenant_id, author) for author in authors]) if authors else {}
        for hash_, change in new:
            item = ChangeItem(uuid7(), account.id, dedupe_hash(account.id, change.target), hash_)
            if not isinstance(change, Deleted):
                subject_id = account.pseudonyms.subject(_person(change))
                subject_id = known.get(subject_id, subject_id)
                if (key := keys[account.tenant_id, subject_id]) is None:
                    continue  # The person was erased.
                content = key.seal(_content(account, change), str(item.event_id), "content")
                item = replace(item, kind="edited", order=change.order, subject_id=subject_id, content=content)
            if isinstance(change, Reacted):
                session = account.pseudonyms.session(change.conversation) if change.conversation else ""
                message = change.message.replace("\0", "")
                item = replace(item, kind="reacted", mode=change.mode, message=message, session_key=session)
            tx.enqueue(CHANGES, lane=item.target.hex(), item=item, item_id=item.event_id)

    await database.run(work, tenant_id=account.tenant_id)


def _person(change: Edited | Reacted) -> str:
    return change.message.person if isinstance(change, Edited) else change.person


def _content(account: ChannelAccount, change: Edited | Reacted) -> str:
    if isinstance(change, Edited):
        return routed(account.routes, account.agent_id, change.message)[1]
    return msgspec.json.encode([sign[:MAX_SIGN] for sign in change.signs[:MAX_SIGNS]]).decode()


@CHANGES.runner(concurrency=8, per_tenant=4)
async def apply_change(item: ChangeItem, effects: Effects, tx: Tx, subjects: SubjectKeys) -> None:
    """Stores the fact at its message, and tells the agent of an edit or a deletion."""
    if (target := await _target(tx, item)) is None:
        if effects.attempt <= len(_WAITS):
            raise NotYet(_WAITS[effects.attempt - 1], "the message of the change has not been accepted")
        reason = "of a message that is not known"
    elif item.kind != "reacted" and target.taken is None:
        reason = "of a message of the bot"
    elif item.kind == "edited" and target.taken and item.subject_id != target.taken.subject_id:
        reason = "by another person"
    elif not MESSAGE.decide(item.fact(), await tx.load(MESSAGE.stream(str(target.id)))):
        reason = "of a message that was deleted, or changed too often"
    else:
        # The lane of the message keeps other changes out.
        tx.append(MESSAGE.stream(str(target.id)), item.fact(), event_id=item.event_id)
        if target.taken and item.kind != "reacted":
            await _tell(tx, subjects, item, target, target.taken)
        if item.kind == "deleted":
            await _remove_texts(tx, target)
        return
    await tx.sql("UPDATE inbound_seen SET ignored = $2 WHERE hash = $1", item.seen, f"{item.kind}: {reason}")


async def _target(tx: Tx, item: ChangeItem) -> _Target | None:
    """None if the message is not stored, or not yet."""
    rows = await tx.sql(
        """
        SELECT e.event_id, e.type, e.schema_version, e.data, e.stream_id, e.version
        FROM inbound_seen s JOIN event e USING (event_id)
        WHERE s.hash = $1
        """,
        item.target,
    )
    for id_, type_, schema, data, stream, version in rows:
        # A conversation's stream has a fact for each of its positions.
        return _Target(id_, CONVERSATION.events.decode(type_, schema, data), stream.partition(":")[2], version)
    sent = await tx.sql(
        """
        SELECT id FROM delivery
        WHERE ((channel_id = $1 AND vendor_message_id = $2) OR part_ids && ARRAY[$4]::text[])
            AND ($3 = '' OR session_key = coalesce(
            (SELECT target FROM session_alias WHERE session_key = $3), $3))
        ORDER BY id
        LIMIT 1
        """,
        item.channel_id,
        item.message,
        item.session_key,
        part_id(item.channel_id, item.message),
    )
    return _Target(sent[0][0]) if item.message and sent else None


async def _tell(tx: Tx, subjects: SubjectKeys, item: ChangeItem, target: _Target, taken: MessageTaken) -> None:
    """Tells the agent, unless the person was erased."""
    assert tx.tenant_id
    key = (await subjects.keys(tx, [(tx.tenant_id, taken.subject_id)]))[tx.tenant_id, taken.subject_id]
    if key is None:
        return
    content = msgspec.json.decode(key.open(taken.content, str(target.id), "content"), type=InboundContent)
    changed = MessageChanged(
        channel_id=item.channel_id,
        agent_id=taken.agent_id,
        session_key=target.session_key,
        conversation_id=content.conversation,
        subject_id=taken.subject_id,
        vendor_message_id=content.message,
        message_id=sent_id(target.id),
        position=target.position,
        deleted=item.kind == "deleted",
        text=key.open(item.content, str(item.event_id), "content") if item.kind == "edited" else "",
        # The text that the agent has contains those of the files.
        has_files=bool(content.attachments),
        order=item.order,
        changed_at=utcnow(),
    )
    tx.send(CHANNEL_CHANGES, changed, key=target.session_key, message_id=derived_id(item.event_id, "sent"))


async def _remove_texts(tx: Tx, target: _Target) -> None:
    """Removes the text of the message and of its edits from their facts, and deletes its files."""
    rows = await tx.sql(
        """
        SELECT event_id, type, schema_version, data FROM event
        WHERE event_id = $1 OR (stream_id = $2 AND type = 'MessageEdited')
        ORDER BY event_id
        """,
        target.id,
        MESSAGE.stream(str(target.id)).row,
    )
    emptied = {}
    for id_, *stored in rows:
        kind = CONVERSATION if id_ == target.id else MESSAGE
        emptied[id_] = replace(kind.events.decode(*stored), content=b"")
    await event_store.rewrite(await tx.connection(), emptied)
    assert target.taken
    subject_id = target.taken.subject_id
    tx.enqueue(FORGOTTEN, lane=str(target.id), item=ForgetDocuments(subject_id, target.id))
    queue_passes(tx, subject_id, target.id)
