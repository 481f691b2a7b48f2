"""New versions of documents. Searches read the old version until the new one is indexed, and then the new one."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.stores.objects import Stored
from services.memory.knowledge.documents import NEWEST, lock
from services.memory.metering import storage


async def replace(
    tx: Tx, id_: UUID, next_id: UUID, name: str, stored: Stored, created_by: str
) -> tuple[bool, UUID | None]:
    """Adds `stored` as the document's next version, in a row `next_id` of its own until it is indexed.

    Returns whether it was added, and the row of a waiting version that is given up for it. It is not added if the
    newest version has the same bytes and has not failed. Raises NotFound.
    """
    await lock(tx, id_)
    [(newest_id, sha256, status, version)] = await tx.sql(
        f"SELECT n.id, n.sha256, n.status, n.version FROM {NEWEST} WHERE d.id = $1", id_
    )
    if sha256 == stored.sha256 and status != "failed":
        return False, None
    if newest_id != id_:
        await tx.sql("UPDATE document SET deleted_at = clock_timestamp() WHERE id = $1", newest_id)
    await tx.sql(
        """
        INSERT INTO document
            (id, tenant_id, name, content_type, size, sha256, path, status, created_by, version, replaces)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'stored', $8, $9, $10)
        """,
        next_id,
        tx.tenant_id,
        name,
        stored.content_type,
        stored.size,
        stored.sha256,
        stored.path,
        created_by,
        version + 1,
        id_,
    )
    await storage.change(tx, stored.size)
    return True, newest_id if newest_id != id_ else None


class OldVersion(NamedTuple):
    """The place of a version that was replaced."""

    path: str
    owner: UUID
    """Of its rows in the index."""


async def switch(tx: Tx, next_id: UUID, document_id: UUID) -> OldVersion | None:
    """Puts the next version, which is complete, in the place of the document. Readers see all of the old one before
    the commit and all of the new one after it. None if one of them was deleted meanwhile."""
    try:
        await lock(tx, document_id)
    except NotFound:
        return None
    # Locks both versions: one that is deleted at the same time must not come back.
    if not await tx.sql("SELECT id FROM document WHERE id = $1 AND deleted_at IS NULL FOR UPDATE", next_id):
        return None
    [(*old, size)] = await tx.sql(
        "SELECT path, coalesce(index_owner, id), size FROM document WHERE id = $1", document_id
    )
    await tx.sql("DELETE FROM passage WHERE document_id = $1", document_id)
    await tx.sql("UPDATE passage SET document_id = $1 WHERE document_id = $2", document_id, next_id)
    await tx.sql(
        """
        UPDATE document d
        SET name = n.name, content_type = n.content_type, size = n.size, sha256 = n.sha256, path = n.path,
            status = 'indexed', progress = 1, error = NULL, pages = n.pages,
            pages_without_text = n.pages_without_text, warnings = n.warnings, version = n.version,
            index_owner = n.id, indexed_in = n.indexed_in,
            channel_id = n.channel_id, message_id = n.message_id, subject_id = n.subject_id
        FROM document n
        WHERE d.id = $1 AND n.id = $2
        """,
        document_id,
        next_id,
    )
    await tx.sql("DELETE FROM document WHERE id = $1", next_id)
    await storage.change(tx, -size)
    return OldVersion(*old)


async def place(tx: Tx, id_: UUID) -> OldVersion | None:
    """The place of the document's file and rows, also of a deleted document; None if its row is gone."""
    rows = await tx.sql("SELECT path, coalesce(index_owner, id) FROM document WHERE id = $1", id_)
    return OldVersion(*rows[0]) if rows else None


async def reuse_vectors(tx: Tx, next_id: UUID, document_id: UUID) -> None:
    """Gives the passages of the next version the vectors of the same passages of the version before."""
    await tx.sql(
        """
        UPDATE passage p
        SET model = o.model, vector = o.vector, other_model = o.other_model, other_vector = o.other_vector
        FROM passage o
        WHERE p.document_id = $1 AND p.vector IS NULL AND p.other_vector IS NULL AND o.document_id = $2
            AND o.text = p.text AND o.section IS NOT DISTINCT FROM p.section
        """,
        next_id,
        document_id,
    )
