"""Attachments: fetched from the vendor, stored, and given to the agent as text.

A message with attachments is accepted and gets its position as every other message does. It is sent to the agent once
its attachments were fetched; the agent takes the later messages of the conversation after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from uuid import UUID

import msgspec

from infra.errors import EffectFailed, InvalidMessage, NotFound, TooLarge, Transient, Unanswered, WrongType
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.outgoing.client import Outgoing
from infra.postgres.database import Database
from infra.postgres.tx import Tx, derived_id
from infra.security.crypto import DataKey
from infra.security.subjects import ERASED_TEXT, Erased, SubjectKeys
from infra.service.service import Runtime
from infra.stores import charsets, filetypes
from infra.stores.objects import Kind, Objects, once, safe_name
from infra.web import rpc
from protos.catalog import CHANNEL_EVENTS, CHANNEL_INBOUND, PLATFORM_EVENTS
from protos.images import IMAGE_TYPES, MAX_IMAGE_BYTES
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.messages.channel import Image, MessageReceived
from protos.messages.user import SubjectErased
from services.channel.accounts import store as accounts
from services.channel.accounts.store import AccountSecrets, ChannelAccount, unless_replaced
from services.channel.events import Attachment, InboundContent, MessageTaken
from services.channel.files.transcription import Transcription
from services.channel.publishing import CONVERSATION

MAX_BYTES = 20 * 1024 * 1024
"""Of one file: the most that Telegram gives."""
MAX_ATTACHMENTS = 10
"""Of one message. Further ones are named and not fetched."""
MAX_CHARACTERS = 60_000
"""Of the texts of all files of a message."""
# The time before each further attempt. After the last one the file counts as unreadable, so that the message is
# answered.
_RETRIES = tuple(timedelta(seconds=seconds) for seconds in (1, 5, 20, 60))

_DOCUMENTS = (filetypes.PDF, *filetypes.OFFICE, filetypes.HTML)
# Memory reads one file at a time, each in 45 s, in turns by tenant: this is longer than one of each of five tenants.
_READ_SECONDS = 280.0
# Of one message. After it the message's other documents are not read: they would keep its place from other tenants.
_DOCUMENT_SECONDS = 100.0
# When stored files are deleted, after their person was erased or their message deleted. The first: longer than one file
# is usually fetched for. The second: longer than all files of a message are fetched and read for, and than a run takes.
_PASSES = (timedelta(minutes=5), timedelta(hours=2))

ATTACHMENT = Kind(
    "attachment",
    MAX_BYTES,
    frozenset(
        (
            "image/",
            "audio/",
            "video/",
            filetypes.PDF,
            *filetypes.OFFICE,
            *filetypes.TEXTS,
            filetypes.HTML,
        )
    ),
)
_NAMES = {"image": "an image", "voice": "a voice message", "video": "a video", "file": "a file"}


class FetchAttachments(msgspec.Struct, frozen=True):
    """The attachments of a stored message are to be fetched, and the message sent to the agent."""

    event_id: UUID
    session_key: str
    position: int
    parent_session_key: str = ""
    thread_run_id: UUID | None = None
    in_album: bool = False
    """As in `InboundContent`."""
    has_waited: bool = False
    """For the parts of its album that stood in the lane behind it. Its files are fetched already."""


# One lane per conversation.
FETCHES = Lane("attachments", FetchAttachments, retries=_RETRIES)


class FetchedAttachment(msgspec.Struct, frozen=True):
    """The recorded result of one attachment: a sealed `_Read`."""

    sealed: bytes


class _Read(msgspec.Struct, frozen=True):
    text: str = ""
    """The text of the file, or of the voice."""
    reason: str = ""
    """Why there is no text."""
    image: Image | None = None
    """The file, if a model can see it."""


class _Reading:
    """The documents of one message that memory reads."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Fetcher:
    """Fetches, stores and reads attachments."""

    def __init__(
        self,
        secrets: AccountSecrets,
        subjects: SubjectKeys,
        outgoing: Outgoing,
        objects: Objects,
        transcription: Transcription | None,
        memory: memory_pb2_grpc.MemoryStub,
    ) -> None:
        self._secrets = secrets
        self._subjects = subjects
        self._outgoing = outgoing
        self.objects = objects
        self._transcription = transcription
        self._memory = memory

    async def load(self, tx: Tx, item: FetchAttachments) -> tuple[MessageTaken, InboundContent | None, DataKey | None]:
        """The stored message. The content is None if the person was erased, or has deleted the message."""
        [(type_, version, data)] = await tx.sql(
            "SELECT type, schema_version, data FROM event WHERE event_id = $1", item.event_id
        )
        fact: MessageTaken = CONVERSATION.events.decode(type_, version, data)
        try:
            key = await self._subjects.key(tx, str(tx.tenant_id), fact.subject_id)
        except Erased:
            return fact, None, None
        if not fact.content:
            # The message was deleted meanwhile.
            return fact, None, None
        sealed = key.open(fact.content, str(item.event_id), "content")
        return fact, msgspec.json.decode(sealed, type=InboundContent), key

    async def account(self, tx: Tx, fact: MessageTaken) -> ChannelAccount | None:
        return await accounts.read(tx, self._secrets, fact.channel_id)

    async def fetch(
        self,
        effects: Effects,
        account: ChannelAccount,
        attachment: Attachment,
        path: str,
        owner: str,
        reading: _Reading,
        *,
        last: bool,
    ) -> _Read:
        """Raises Transient unless this is the last attempt."""
        try:
            about = self._outgoing, account.origin, account.credentials
            content = await unless_replaced(effects, account, account.vendor.fetch(*about, attachment.ref, MAX_BYTES))
            stored = await self.objects.upload(
                ATTACHMENT, once(content), name=attachment.name, user_id=owner, path=lambda _: path
            )
        except TooLarge:
            return _Read(reason=f"it is larger than {MAX_BYTES // 1024**2} MB")
        except WrongType as error:
            return _Read(reason=error.reason)
        except (EffectFailed, InvalidMessage) as error:
            return _Read(reason=str(error)[:200])
        except (Transient, Unanswered) as error:
            if last:
                return _Read(reason=f"it could not be fetched: {error}"[:200])
            raise Transient(str(error)) from error
        if stored.content_type in IMAGE_TYPES:
            if stored.size > MAX_IMAGE_BYTES:
                return _Read(reason=f"it is an image larger than {MAX_IMAGE_BYTES // 1024**2} MB")
            return _Read(image=Image(path=path, content_type=stored.content_type))
        if stored.content_type in _DOCUMENTS:
            return await self._read_document(account.tenant_id, path, stored.content_type, reading, last=last)
        return await self._read(content, stored.content_type, attachment, last=last)

    async def _read_document(self, tenant_id: str, path: str, type_: str, reading: _Reading, *, last: bool) -> _Read:
        """By the parser of memory, which reads hostile files in a process of its own."""
        if reading.seconds >= _DOCUMENT_SECONDS:
            return _Read(reason="the files before it took too long")
        request = memory_pb2.ReadFileRequest(path=path, content_type=type_, max_characters=MAX_CHARACTERS)
        began = monotonic()
        try:
            reply = await self._memory.ReadFile(request, metadata=rpc.tenant_metadata(tenant_id), timeout=_READ_SECONDS)
        except (Transient, InvalidMessage, NotFound) as error:
            if last or not isinstance(error, Transient):
                return _Read(reason=f"it could not be read: {error}"[:200])
            raise
        finally:
            reading.seconds += monotonic() - began
        notes = "".join(f"\n[{note}]" for note in (*reply.warnings, *(["The rest of it is cut off."] * reply.is_cut)))
        return _Read(text=reply.text + notes if reply.text else "", reason=reply.refused)

    async def _read(self, content: bytes, type_: str, attachment: Attachment, *, last: bool) -> _Read:
        if type_ in filetypes.TEXTS:
            try:
                # As memory reads a document. Not on the event loop: a text of few letters is judged by all encodings.
                text, _ = await asyncio.to_thread(charsets.decode, content, characters=MAX_CHARACTERS)
                return _Read(text=text.replace("\0", ""))
            except charsets.UnknownEncoding:
                return _Read(reason="its character encoding is not recognised; it must be saved as UTF-8")
        # A voice message in an MP4 container looks like a video.
        if type_.startswith("audio/") or (attachment.kind == "voice" and type_.startswith("video/")):
            if self._transcription is None:
                return _Read(reason="voice messages are not transcribed here")
            try:
                return _Read(text=await self._transcription.text(content, attachment.name, type_))
            except EffectFailed as error:
                return _Read(reason=str(error))
            except (Transient, Unanswered) as error:
                if last:
                    return _Read(reason=f"it could not be transcribed: {error}"[:200])
                raise Transient(str(error)) from error
        return _Read(reason=f"files of type {type_} are not read here")


async def give_up(item: FetchAttachments, error: str, tx: Tx, fetcher: Fetcher) -> None:
    """The message is answered without its attachments. The dead letter of the item holds the error."""
    fact, content, _ = await fetcher.load(tx, item)
    content = content or InboundContent("", "", "", ERASED_TEXT)
    failed = [_Read(reason="of an internal error")] * len(content.attachments)
    publish(tx, item, fact, content, together(content, failed))


# One message per tenant at a time, so that slow files leave places to other tenants. Each place has one file in memory.
@FETCHES.runner(concurrency=6, per_tenant=1, dead=give_up)
async def fetch_attachments(item: FetchAttachments, effects: Effects, tx: Tx, fetcher: Fetcher) -> None:
    async with effects.begin() as loading:
        fact, content, key = await fetcher.load(loading, item)
        account = await fetcher.account(loading, fact)
    if content is None or key is None:
        # The agent drops it, too. It is sent nevertheless, because the later messages wait for its position.
        publish(tx, item, fact, InboundContent("", "", "", ERASED_TEXT), ERASED_TEXT)
        return
    folder = f"{folder_of(str(tx.tenant_id), fact.subject_id)}/{item.session_key}"
    paths = {
        n: f"{folder}/{item.event_id}_{n}_{safe_name(one.name or one.kind)}"
        for n, one in enumerate(content.attachments[:MAX_ATTACHMENTS], 1)
    }
    async with effects.begin() as noting:
        # Before the files, so that an erasure finds all of them.
        await _note(noting, fact.subject_id, sorted(paths.values()))
    read = []
    reading = _Reading()
    for n, path in paths.items():
        attachment = content.attachments[n - 1]
        if account is None:
            read.append(_Read(reason="the channel was deleted"))
            continue

        async def call(
            _: str, account: ChannelAccount = account, attachment: Attachment = attachment, path: str = path, n: int = n
        ) -> FetchedAttachment:
            last = effects.attempt > len(_RETRIES)
            result = await fetcher.fetch(effects, account, attachment, path, fact.subject_id, reading, last=last)
            return FetchedAttachment(
                key.seal(msgspec.json.encode(result).decode(), str(item.event_id), f"attachment {n}")
            )

        outcome = await effects.run(f"{item.event_id}/{n}", call, kind="repeatable", result=FetchedAttachment)
        assert outcome.result is not None
        opened = key.open(outcome.result.sealed, str(item.event_id), f"attachment {n}")
        read.append(msgspec.json.decode(opened, type=_Read))
    read += [_Read(reason=f"only {MAX_ATTACHMENTS} are read")] * (len(content.attachments) - len(read))
    if item.in_album and not item.has_waited and await _is_followed(tx, effects):
        # Otherwise the agent would answer it before a slow file of the next part is fetched.
        again = msgspec.structs.replace(item, has_waited=True)
        tx.enqueue(FETCHES, lane=item.session_key, item=again, item_id=derived_id(item.event_id, "has waited"))
        return
    images = tuple(result.image for result in read if result.image)
    publish(tx, item, fact, content, together(content, read), images)


async def _is_followed(tx: Tx, effects: Effects) -> bool:
    """The next item of the lane is a part of an album, too, whose files are not fetched yet."""
    rows = await tx.sql(
        """
        SELECT body FROM lane_item
        WHERE lane_id = $1 AND seq > $2 AND state = 'waiting'
        ORDER BY seq
        LIMIT 1
        """,
        effects.lease.lane_id,
        effects.seq,
    )
    following = [msgspec.json.decode(body, type=FetchAttachments) for (body,) in rows]
    return any(item.in_album and not item.has_waited for item in following)


def folder_of(tenant_id: str, subject_id: str) -> str:
    """The folder of a person's files. Memory reads those of the caller's tenant only."""
    return f"{subject_id}/attachments/{tenant_id}"


async def in_folder(database: Database, objects: Objects, tenant_id: str, subject_id: str, path: str) -> str:
    """The path of the file below `folder_of`. A file from before paths had the tenant is copied there."""
    folder = folder_of(tenant_id, subject_id)
    if path.startswith(f"{folder}/"):
        return path
    copy = f"{folder}/{path.partition('/attachments/')[2]}"
    async with database.begin(tenant_id=tenant_id) as tx:
        await _note(tx, subject_id, [copy])
    async with objects.fetch(path) as file:
        name = path.rpartition("/")[2]
        content = once(await asyncio.to_thread(file.read))
        await objects.upload(ATTACHMENT, content, name=name, user_id=subject_id, path=lambda _: copy)
    return copy


async def _note(tx: Tx, subject_id: str, paths: Sequence[str]) -> None:
    await tx.sql(
        """
        INSERT INTO attachment (path, tenant_id, subject_id) SELECT path, $2, $3 FROM unnest($1::text[]) AS n(path)
        ON CONFLICT DO NOTHING
        """,
        paths,
        tx.tenant_id,
        subject_id,
    )


class EraseFiles(msgspec.Struct, frozen=True):
    """The stored files of an erased person, or of one deleted message, are to be deleted."""

    subject_id: str
    event_id: UUID | None = None
    """Of the message; None: all files of the person."""
    is_last: bool = True
    """False: the rows stay, for files that are stored later."""


ERASURES = Lane("erased files", EraseFiles)


@PLATFORM_EVENTS.each(SubjectErased, group="channel")
async def queue_erasure(event: SubjectErased, tx: Tx) -> None:
    tx.tenant_id = event.tenant_id
    queue_passes(tx, event.subject_id)


def queue_passes(tx: Tx, subject_id: str, event_id: UUID | None = None) -> None:
    """Queues the deletion of the stored files of a person, or of one message. Files that are being fetched or made at
    this moment are stored before, at the latest before the last pass."""
    for after in _PASSES:
        item = EraseFiles(subject_id, event_id, is_last=after == _PASSES[-1])
        tx.enqueue(ERASURES, lane=subject_id, item=item, after=after)


@ERASURES.runner(concurrency=2)
async def erase_files(item: EraseFiles, effects: Effects, tx: Tx, fetcher: Fetcher) -> None:
    async with effects.begin() as reading:
        rows = await reading.sql(
            """
            SELECT path FROM attachment
            WHERE tenant_id = $1 AND subject_id = $2 AND ($3 = '' OR strpos(path, '/' || $3 || '_') > 0)
            ORDER BY path
            """,
            reading.tenant_id,
            item.subject_id,
            str(item.event_id or ""),
        )
    made: Sequence[str] = ()
    if item.event_id is None:
        # Files that an agent made for this person have no rows.
        made = await fetcher.objects.paths(f"{folder_of(str(reading.tenant_id), item.subject_id)}/")
    for path in (*made, *(path for (path,) in rows)):
        await fetcher.objects.delete(path)
    if item.is_last:
        await tx.sql("DELETE FROM attachment WHERE path = ANY($1::text[])", [path for (path,) in rows])


class ForgetDocuments(msgspec.Struct, frozen=True):
    """The documents that were made of the files of a deleted message are to be deleted."""

    subject_id: str
    event_id: UUID


FORGOTTEN = Lane("documents of deleted messages", ForgetDocuments)


@FORGOTTEN.runner(concurrency=2)
async def forget_documents(item: ForgetDocuments, effects: Effects, tx: Tx, memory: memory_pb2_grpc.MemoryStub) -> None:
    request = memory_pb2.ForgetFilesRequest(subject_id=item.subject_id, message_id=str(item.event_id))
    await memory.ForgetFiles(request, metadata=rpc.tenant_metadata(str(tx.tenant_id)))


def together(content: InboundContent, read: Sequence[_Read]) -> str:
    """The text for the agent: the person's words, then each attachment."""
    parts = [content.text] if content.text.strip() else []
    left = MAX_CHARACTERS
    for attachment, result in zip(content.attachments, read, strict=True):
        named = _NAMES[attachment.kind] + (f" ({attachment.name})" if attachment.name else "")
        if result.image:
            parts.append(f"[The person sent {named}.]")
        elif result.text.strip():
            text = result.text[:left]
            left -= len(text)
            cut = "" if len(text) == len(result.text) else "\n[The rest of it is cut off.]"
            parts.append(f"[The person sent {named}. Its text:]\n{text}{cut}")
        else:
            reason = result.reason or "it has no text"
            parts.append(f"[The person sent {named}, which cannot be read here: {reason}. Tell the person so.]")
    return "\n\n".join(parts)


def publish(
    tx: Tx,
    item: FetchAttachments,
    fact: MessageTaken,
    content: InboundContent,
    text: str,
    images: tuple[Image, ...] = (),
) -> None:
    """Publishes the message, and sends it to the agent."""
    public = MessageReceived(
        channel_id=fact.channel_id,
        channel_type=fact.channel_type,
        agent_id=fact.agent_id,
        session_key=item.session_key,
        conversation_id=content.conversation,
        subject_id=fact.subject_id,
        vendor_message_id=content.message,
        text=text,
        # A file says something, too.
        words="" if content.attachments else content.words,
        for_others=content.for_others,
        in_album=content.in_album,
        received_at=fact.received_at,
        position=item.position,
        parent_session_key=item.parent_session_key,
        thread_run_id=item.thread_run_id,
        images=images,
        by_admin=fact.by_admin,
        approvers=fact.approvers,
    )
    # The id with which `publishing.publish_again` emits it from the stored fact.
    tx.publish(CHANNEL_EVENTS, public, key=item.session_key, message_id=derived_id(item.event_id, "publication", 0))
    tx.send(
        CHANNEL_INBOUND[fact.channel_type],
        public,
        key=item.session_key,
        position=item.position,
        message_id=sent_id(item.event_id),
    )


def sent_id(event_id: UUID) -> UUID:
    """The id of the message as it is sent to the agent."""
    return derived_id(event_id, "sent")


def stored_objects(runtime: Runtime) -> Objects:
    settings = runtime.settings
    return Objects(settings.s3_endpoint, settings.s3_access_key, settings.s3_secret_key.get_secret_value())


def memory_stub(runtime: Runtime) -> memory_pb2_grpc.MemoryStub:
    safe = [f"clawbus.memory.v1.Memory/{method}" for method in ("ReadFile", "KeepFile", "ForgetFiles")]
    return memory_pb2_grpc.MemoryStub(runtime.channels.to(runtime.settings.memory_grpc, "memory", safe=safe))


def fetcher(runtime: Runtime) -> Fetcher:
    settings = runtime.settings
    transcription = None
    if settings.transcription_base_url:
        key = settings.transcription_api_key
        transcription = Transcription(
            runtime.outgoing,
            settings.transcription_base_url,
            settings.transcription_model,
            key.get_secret_value() if key else None,
        )
    return Fetcher(
        AccountSecrets(runtime.cipher),
        SubjectKeys(runtime.cipher),
        runtime.outgoing,
        stored_objects(runtime),
        transcription,
        memory_stub(runtime),
    )
