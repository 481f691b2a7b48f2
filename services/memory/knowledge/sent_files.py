"""Documents that are made of files which people sent in chats. They end with the message, or with the person."""

from __future__ import annotations

from uuid import UUID

from infra.errors import Conflict, NotFound
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.subjects import SubjectKeys
from infra.stores.objects import Objects
from protos.catalog import DOCUMENT_INDEX
from protos.memory.v1 import memory_pb2
from protos.messages.memory import IndexDocument
from services.memory import rights
from services.memory.knowledge import documents
from services.memory.knowledge.received import checked_name
from services.memory.knowledge.uploads import Uploads
from services.memory.memories.forgetting import is_withdrawn, mark_withdrawn
from services.memory.memories.store import lock
from services.memory.metering.credit import Credit
from services.memory.metering.usage import of_client


class SentFiles:
    def __init__(
        self, database: Database, objects: Objects, uploads: Uploads, subjects: SubjectKeys, credit: Credit
    ) -> None:
        self._database = database
        self._objects = objects
        self._uploads = uploads
        self._subjects = subjects
        self._credit = credit

    async def keep(self, tenant_id: str, origin: documents.DocumentOrigin, asked: memory_pb2.KeepFileRequest) -> None:
        """Makes a document of the file; one that was made before stays as it is. Raises InvalidMessage, NotFound,
        Conflict, NoCredit, and Transient if billing does not answer, for too many files."""
        id_, user_id = UUID(asked.document_id), asked.actor.partition(":")[2]
        name = checked_name("name", asked.name)
        audience, tags = rights.checked_audience(asked.audience or [rights.ALL]), rights.checked_tags(asked.tags)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            if await _exists(tx, id_):
                return
        payer = of_client(asked.actor, channel_id=origin.channel_id)
        await self._credit.hold_document(tenant_id, id_, payer, cannot_wait=True)
        async with self._objects.fetch(asked.path) as file:
            stored = await self._uploads.store(file, name=name, tenant_id=tenant_id, user_id=user_id, id_=id_)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            # Before the lock, which an erasure takes after it has changed the key.
            await self._subjects.keys(tx, [(tenant_id, origin.subject_id)])
            withdrawn = await is_withdrawn(tx, origin.subject_id, origin.message_id)
            key = (await self._subjects.keys(tx, [(tenant_id, origin.subject_id)]))[tenant_id, origin.subject_id]
            if await _exists(tx, id_):
                return
            if not withdrawn and key:
                await documents.add(
                    tx, id_, name, stored, audience=audience, tags=tags, created_by=asked.actor, origin=origin
                )
                tx.send(DOCUMENT_INDEX, IndexDocument(document_id=id_))
                about = {"audience": " ".join(audience), "message_id": str(origin.message_id)}
                audit(tx, asked.actor, "document.upload", "document", str(id_), **about)
                return
        await self._objects.delete(stored.path)
        await self._credit.release_document(tenant_id, id_)
        raise NotFound("the message was deleted, or its person was erased")

    async def forget(self, tenant_id: str, subject_id: str, message_id: UUID) -> None:
        """Deletes the documents that were made of the files of a deleted message. None is made of them later."""
        async with self._database.begin(tenant_id=tenant_id) as tx:
            await lock(tx, "user", subject_id)
            await mark_withdrawn(tx, message_id)
            await documents.delete(tx, await documents.made_of(tx, subject_id, message_id))


async def _exists(tx: Tx, id_: UUID) -> bool:
    """Raises Conflict if it is being deleted."""
    rows = await tx.sql("SELECT deleted_at IS NULL FROM document WHERE id = $1", id_)
    if rows and not rows[0][0]:
        raise Conflict(f"document {id_} is being deleted")
    return bool(rows)
