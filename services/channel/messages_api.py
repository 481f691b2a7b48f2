"""HTTP API of messages: those of conversations in both directions, and sending without a run."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx, derived_id
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.security.crypto import DataKey
from infra.security.reads import record_reads
from infra.security.subjects import ERASED_TEXT, SubjectKeys
from infra.service.api import Admin, Paging, Reader, Writer, of_one_page, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from infra.web import rpc
from protos.catalog import CHANNEL_ANSWERS
from protos.memory.v1 import memory_pb2
from protos.messages.channel import AnswerByPerson, Sender, SendMessage
from services.channel import history
from services.channel.accounts import store as stored
from services.channel.accounts.channels import reachable
from services.channel.accounts.routing import agent_of
from services.channel.accounts.store import AccountSecrets, ChannelAccount
from services.channel.deliveries.queueing import EXPIRES, queue_delivery
from services.channel.domain import State
from services.channel.events import File, InboundContent, MessageTaken, OutboundContent
from services.channel.files.attachments import MAX_ATTACHMENTS, in_folder, memory_stub, stored_objects
from services.channel.publishing import CONVERSATION, DELIVERY

MAX_TEXT = 100_000
MAX_FILES = 10
# Memory copies the file.
KEEP_SECONDS = 30.0
DELETED_TEXT = "[deleted]"
"""Readers show this in place of a text that its author has deleted."""

# Reads only. The tenant's channels that have conversations, by one look into the index for each.
_CHANNELS = """
WITH RECURSIVE known AS (
    (SELECT channel_id FROM conversation ORDER BY channel_id LIMIT 1)
    UNION ALL
    SELECT n.channel_id FROM known k CROSS JOIN LATERAL (
        SELECT channel_id FROM conversation WHERE channel_id > k.channel_id ORDER BY channel_id LIMIT 1
    ) n
)
SELECT channel_id::text FROM known
"""
_CHANNEL = "SELECT channel_id::text FROM conversation WHERE channel_id = $1 LIMIT 1"
_SESSION = "SELECT session_key FROM conversation WHERE session_key = $1 AND ($2::uuid IS NULL OR channel_id = $2)"
# Reads only. The newest before the cursor: of each channel, or of one session. Each statement has its index, which ends
# in the time. So a page costs the same wherever it is in the list.
_INBOUND = """
SELECT m.recorded_at, m.event_id, m.event_id, octet_length(m.data), substr(m.stream_id, length($1) + 1)
FROM unnest($2::text[]) AS c(id) CROSS JOIN LATERAL (
    SELECT stream_id, event_id, recorded_at, data FROM event
    WHERE type = 'MessageTaken' AND {of}
        AND (recorded_at, event_id) < (coalesce($3::timestamptz, 'infinity'), $4::uuid)
    ORDER BY recorded_at DESC, event_id DESC
    LIMIT $5
) m
ORDER BY m.recorded_at DESC, m.event_id DESC
LIMIT $5
"""
_INBOUND_OF_CHANNELS = _INBOUND.format(of=f"{history.CHANNEL} = c.id::bytea")
_INBOUND_OF_SESSION = _INBOUND.format(of="stream_id = $1 || c.id")
_ONE = """
SELECT e.type, e.schema_version, e.data, c.channel_id
FROM event e JOIN conversation c ON c.session_key = substr(e.stream_id, length($1) + 1)
WHERE e.event_id = $2 AND starts_with(e.stream_id, $1)
"""
_FILE = """
SELECT path FROM attachment WHERE tenant_id = $1 AND subject_id = $2 AND strpos(path, '/' || $3 || '_') > 0
ORDER BY strpos(path, '/' || $1 || '/') = 0
"""
_EVENTS = "SELECT event_id, type, schema_version, data FROM event WHERE event_id = ANY($1::uuid[])"
# The first event of a delivery's stream has its content.
_OUTBOUND = """
SELECT d.created_at, d.id, e.event_id, octet_length(e.data), d.state, d.reason, d.vendor_message_id
FROM (
    SELECT d.*
    FROM unnest($2::text[]) AS c(id) CROSS JOIN LATERAL (
        SELECT id, created_at, state, reason, vendor_message_id FROM delivery
        WHERE {of} AND (created_at, id) < (coalesce($3::timestamptz, 'infinity'), $4::uuid)
        ORDER BY created_at DESC, id DESC
        LIMIT $5
    ) d
    ORDER BY d.created_at DESC, d.id DESC
    LIMIT $5
) d JOIN event e ON e.stream_id = $1 || d.id::text AND e.version = 1
"""
_OUTBOUND_OF_CHANNELS = _OUTBOUND.format(of="channel_id = c.id::uuid")
_OUTBOUND_OF_SESSION = _OUTBOUND.format(of="session_key = c.id")


class FileLink(BaseModel):
    """A file by its address, which is fetched when the message is sent."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"url": "https://files.example.com/label.pdf", "name": "label.pdf"}]},
    )

    url: str = Field(min_length=1, max_length=1_500, pattern="^https?://[!-;=?-~]+$")
    name: str = Field(default="", max_length=200)
    """The name that the person sees; empty: the last part of the address."""


class SentFile(BaseModel):
    """A file of a message."""

    url: str | None
    """Null if a person sent the file, or an agent made it."""
    name: str
    """Empty if the vendor tells none."""


class NewDocument(BaseModel):
    """How the file becomes a document."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"audience": ["group:sales"]}]})

    attachment: int = Field(default=1, ge=1, le=MAX_ATTACHMENTS)
    """The number of the file in the message."""
    name: str | None = None
    """The name that the person's file has, if null."""
    audience: list[str] = []
    """Who may read it; everyone if it is empty."""
    tags: list[str] = []


class MadeDocument(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"document_id": "0199c1d2-0000-7000-8000-000000000001"}]})

    document_id: UUID


class Reaction(BaseModel):
    """A sign that a person put to a message."""

    sign: str
    """As the vendor names it: ``👍``, ``:thumbsup:``."""
    subject_id: str
    """Our id of the person."""


class MessageView(BaseModel):
    """A message between a person and a channel."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "0199c1d2-0000-7000-8000-000000000001",
                    "direction": "outbound",
                    "channel_id": "0199c1d2-0000-7000-8000-000000000002",
                    "session_key": "5f0c6f1e8c3b4a52",
                    "conversation_id": "42",
                    "text": "Refunds take five days.",
                    "attachments": [],
                    "edited": False,
                    "reactions": [],
                    "state": "sent",
                    "reason": None,
                    "run_id": "0199c1d2-0000-7000-8000-000000000003",
                    "vendor_message_id": "8",
                    "created_at": "2026-01-01T12:00:04Z",
                }
            ]
        }
    )

    id: UUID
    """For an outbound message the id of its delivery."""
    direction: Literal["inbound", "outbound"]
    channel_id: UUID
    session_key: str
    conversation_id: str | None
    """The vendor's id; null if the person was erased."""
    text: str
    """The newest, if it was edited; ``[erased]`` if the person was erased, ``[deleted]`` if the person deleted it."""
    attachments: list[SentFile] = []
    """Its files, in order."""
    edited: bool = False
    reactions: list[Reaction] = []
    state: Literal["received", "deleted"] | State
    reason: str | None
    """Why the state is ``failed`` or ``unknown``; else null."""
    run_id: UUID | None
    """The run that wrote an outbound message; null if a person wrote it."""
    vendor_message_id: str | None
    created_at: datetime

    def cursor(self) -> str:
        return f"{self.created_at.isoformat()} {self.id}"


class MessagePage(BaseModel):
    items: list[MessageView]
    next: str | None


class NewChannelMessage(BaseModel):
    """A message to a conversation."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "conversation_id": "42",
                    "text": "Your parcel has left our house.",
                    "attachments": [{"url": "https://files.example.com/label.pdf", "name": "label.pdf"}],
                }
            ]
        },
    )

    conversation_id: str = Field(min_length=1, max_length=500)
    """The vendor's id, as `GET /api/v1/messages` shows it, such as a Telegram chat or a WhatsApp number."""
    text: str = Field(min_length=1, max_length=MAX_TEXT)
    attachments: list[FileLink] = Field(default=[], max_length=MAX_FILES)
    """Sent after the text, as files if the channel's type takes them, else as links."""


class Queued(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"delivery_id": "0199c1d2-0000-7000-8000-000000000001"}]})

    delivery_id: UUID


def router(runtime: Runtime, secrets: AccountSecrets) -> APIRouter:
    router = APIRouter(prefix="/api/v1", tags=["messages"])
    subjects = SubjectKeys(runtime.cipher)
    memory = memory_stub(runtime)
    objects = stored_objects(runtime)

    @router.get("/messages")
    async def list_messages(
        who: Reader,
        paging: Paging,
        session_key: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
        channel_id: Annotated[UUID | None, Query()] = None,
    ) -> MessagePage:
        """The messages of a session, of a channel, or of all channels, newest first. A page of long messages has fewer
        than `limit`."""
        before = paging.after_time(UUID) or (None, None)
        taken, sent = _INBOUND_OF_CHANNELS, _OUTBOUND_OF_CHANNELS
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if session_key:
                taken, sent = _INBOUND_OF_SESSION, _OUTBOUND_OF_SESSION
                known = await tx.sql(_SESSION, session_key, channel_id)
            elif channel_id:
                known = await tx.sql(_CHANNEL, channel_id)
            else:
                known = await tx.sql(_CHANNELS)
            where = [id_ for (id_,) in known], *before, paging.limit + 1
            inbound = await tx.sql(taken, CONVERSATION.stream("").row, *where)
            outbound = await tx.sql(sent, DELIVERY.stream("").row, *where)
            # By time and id.
            listed = sorted((*inbound, *outbound), key=lambda row: row[:2], reverse=True)
            changing = await history.sizes(tx, [row[1] for row in listed[: paging.limit]])
            sizes = ((row[2], row[3] + changing.get(row[1], 0)) for row in listed[: paging.limit])
            shown = set(of_one_page(sizes))
            more = len(listed) > len(shown)
            stored = {id_: row for id_, *row in await tx.sql(_EVENTS, sorted(shown))}
            inbound, outbound = ([row for row in rows if row[2] in shown] for rows in (inbound, outbound))
            facts = [CONVERSATION.events.decode(*stored[row[2]]) for row in inbound]
            asked = [DELIVERY.events.decode(*stored[row[2]]) for row in outbound]
            people = {(who.tenant_id, fact.subject_id) for fact in (*facts, *asked)}
            keys = await subjects.keys(tx, people) if people else {}
            changed = await history.changes(tx, subjects, [row[1] for row in (*inbound, *outbound)])
            messages = []
            for (at, id_, _, _, session), fact in zip(inbound, facts, strict=True):
                words = _open(keys[who.tenant_id, fact.subject_id], fact.content, id_, InboundContent)
                files = words.attachments if words else ()
                now = changed.get(id_, history.Now())
                text = (words.text if now.text is None else now.text) if words else ERASED_TEXT
                messages.append(
                    MessageView(
                        id=id_,
                        direction="inbound",
                        channel_id=fact.channel_id,
                        session_key=session,
                        conversation_id=words and words.conversation,
                        text=DELETED_TEXT if now.deleted else text,
                        attachments=[SentFile(url=None, name=file.name) for file in files],
                        edited=now.text is not None,
                        reactions=_reactions(now),
                        state="deleted" if now.deleted else "received",
                        reason=None,
                        run_id=None,
                        vendor_message_id=words and words.message,
                        created_at=at,
                    )
                )
            for (at, id_, _, _, state, reason, vendor_message_id), request in zip(outbound, asked, strict=True):
                reply = _open(keys[who.tenant_id, request.subject_id], request.content, id_, OutboundContent)
                messages.append(
                    MessageView(
                        id=id_,
                        direction="outbound",
                        channel_id=request.channel_id,
                        session_key=request.session_key,
                        conversation_id=reply and reply.conversation,
                        text=reply.text if reply else ERASED_TEXT,
                        attachments=[
                            SentFile(url=file.url or None, name=file.name) for file in (reply.files if reply else ())
                        ],
                        reactions=_reactions(changed.get(id_, history.Now())),
                        state=state,
                        reason=reason,
                        run_id=request.run_id,
                        vendor_message_id=vendor_message_id,
                        created_at=at,
                    )
                )
            messages.sort(key=lambda message: (message.created_at, message.id), reverse=True)
            found = page(messages, paging, MessageView.cursor, more=more)
            await record_reads(tx, who, "session", [message.session_key for message in found["items"]])
        return MessagePage(**found)

    @router.post("/channels/{channel_id}/messages", status_code=202, response_model=Queued)
    async def send_message(channel_id: UUID, body: NewChannelMessage, who: Writer, request: Request) -> Response:
        """Sends a text, and files, to a conversation of the channel, without a run. Its delivery shows the outcome."""
        if "\0" in body.conversation_id + body.text:
            raise InvalidMessage("text", "must not contain NUL")
        for n, one in enumerate(body.attachments):
            if not one.name.isprintable():
                raise InvalidMessage(f"attachments[{n}].name", "must not contain control characters")
        if body.attachments:
            # Names are resolved outside a transaction, and only for a channel of the tenant.
            async with runtime.request.begin(tenant_id=who.tenant_id) as reading:
                await _account(reading, secrets, channel_id)
        for n, one in enumerate(body.attachments):
            await reachable(runtime.outgoing, f"attachments[{n}].url", one.url)

        async def work(tx: Tx) -> tuple[int, BaseModel]:
            account = await _account(tx, secrets, channel_id)
            session_key, subject_id = await _conversation(
                tx,
                channel_id,
                account.pseudonyms.session(body.conversation_id),
                # In a chat with one person, this is most vendors' id of the person.
                account.pseudonyms.subject(body.conversation_id),
            )
            message = SendMessage(
                delivery_id=uuid7(),
                channel_id=channel_id,
                session_key=session_key,
                conversation_id=body.conversation_id,
                text=body.text,
                sender=_sender(who),
            )
            files = tuple(File(one.url, one.name) for one in body.attachments)
            await queue_delivery(tx, subjects, message, subject_id, utcnow() + EXPIRES, files)
            answer = AnswerByPerson(
                agent_id=agent_of(account.routes, account.agent_id, body.conversation_id),
                session_key=session_key,
                subject_id=subject_id,
                text="\n".join([body.text, *(file.link for file in files)]),
                sent_at=utcnow(),
            )
            tx.send(CHANNEL_ANSWERS, answer, key=session_key, message_id=derived_id(message.delivery_id, "answer"))
            audit(tx, who.actor, "message.send", "delivery", str(message.delivery_id), channel_id=str(channel_id))
            return 202, Queued(delivery_id=message.delivery_id)

        return await once(request, runtime, who, work)

    @router.post("/messages/{message_id}/document", status_code=202)
    async def make_document(message_id: UUID, body: NewDocument, who: Admin) -> MadeDocument:
        """Makes a document of a file that a person sent. Searches find it once it is indexed.

        The same file becomes one document, however often it is asked for. The document is deleted with the message,
        and with the person.
        """
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(_ONE, CONVERSATION.stream("").row, message_id)
            fact = CONVERSATION.events.decode(*rows[0][:3]) if rows else None
            words = None
            if isinstance(fact, MessageTaken):
                key = (await subjects.keys(tx, [(who.tenant_id, fact.subject_id)]))[who.tenant_id, fact.subject_id]
                words = _open(key, fact.content, message_id, InboundContent)
            if fact is None or words is None or len(words.attachments) < body.attachment:
                raise NotFound("the tenant has no such file of a message")
            paths = await tx.sql(_FILE, who.tenant_id, fact.subject_id, f"{message_id}_{body.attachment}")
        if not paths:
            raise Conflict("the file is not fetched yet, or could not be fetched")
        path = await in_folder(runtime.request, objects, who.tenant_id, fact.subject_id, paths[0][0])
        made = MadeDocument(document_id=derived_id(message_id, "document", body.attachment))
        file = words.attachments[body.attachment - 1]
        request = memory_pb2.KeepFileRequest(
            document_id=str(made.document_id),
            path=path,
            name=body.name or file.name or path.rpartition("/")[2].partition("_")[2],
            audience=body.audience,
            tags=body.tags,
            actor=who.actor,
            subject_id=fact.subject_id,
            channel_id=str(rows[0][3]),
            message_id=str(message_id),
        )
        await memory.KeepFile(request, metadata=rpc.tenant_metadata(who.tenant_id), timeout=KEEP_SECONDS)
        return made

    return router


def _sender(who: Identity) -> Sender:
    kind, _, id_ = who.actor.partition(":")
    return Sender(member_id=UUID(id_) if kind == "member" else None, api_key_id=id_ if kind == "api_key" else "")


async def _account(tx: Tx, secrets: AccountSecrets, channel_id: UUID) -> ChannelAccount:
    account = await stored.read(tx, secrets, channel_id)
    if account is None:
        raise NotFound("the tenant has no channel with this id")
    return account


async def _conversation(tx: Tx, channel_id: UUID, session_key: str, subject_id: str) -> tuple[str, str]:
    """The session of the conversation and whose key seals its texts. A new conversation is stored."""
    aliases = await tx.sql("SELECT target FROM session_alias WHERE session_key = $1", session_key)
    if aliases:
        [(session_key,)] = aliases
    [(subject_id,)] = await tx.sql(
        """
        -- Locks the conversation's row, also if it exists already, as the intake of a message does.
        INSERT INTO conversation AS c (session_key, tenant_id, channel_id, subject_id)
        VALUES ($1, $2, $3, coalesce((SELECT target FROM subject_alias WHERE subject_id = $4), $4))
        ON CONFLICT (session_key) DO UPDATE SET subject_id = c.subject_id
        RETURNING subject_id
        """,
        session_key,
        tx.tenant_id,
        channel_id,
        subject_id,
    )
    return session_key, subject_id


def _reactions(now: history.Now) -> list[Reaction]:
    return [Reaction(sign=sign, subject_id=subject) for subject, signs in now.signs.items() for sign in signs]


def _open(key: DataKey | None, content: bytes, id_: UUID, type_: type[Any]) -> Any:
    """The content; None if the person was erased."""
    return msgspec.json.decode(key.open(content, str(id_), "content"), type=type_) if key and content else None
