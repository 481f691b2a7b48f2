"""The table of documents: one row for each, and one for its next version until that is indexed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.stores.objects import Stored
from services.memory.lanes import enqueue_document
from services.memory.metering import storage
from services.memory.metering.usage import UseSource, of_client
from services.memory.rights import ALL

# The columns of `StoredDocument`. `d` is the document; `n` is its next version, or the document if it has none.
# The path of the file is that of the version which is searched.
_COLUMNS = """
    d.id, n.name, n.content_type, n.size, CASE WHEN d.status = 'indexed' THEN d.path ELSE n.path END, n.status,
    round(n.progress::numeric, 4)::float8, n.error, d.created_at, n.pages, n.pages_without_text, n.warnings,
    d.audience, d.tags, n.version, CASE WHEN d.status = 'indexed' THEN d.version END,
    n.channel_id, n.message_id, n.subject_id
"""
NEWEST = """
    document d
    JOIN document n ON n.id = coalesce(
        (SELECT next.id FROM document next WHERE next.replaces = d.id AND next.deleted_at IS NULL), d.id
    )
"""


class StoredDocument(NamedTuple):
    id: UUID
    name: str
    content_type: str
    size: int
    """Bytes."""
    path: str
    """The key of the file in the object store."""
    status: str
    progress: float
    """From 0 to 1."""
    error: str | None
    created_at: datetime
    pages: int | None
    pages_without_text: list[int]
    warnings: list[str]
    audience: list[str]
    tags: list[str]
    version: int
    """Of the newest version. Name, type, size, status and the parser's remarks are that version's."""
    indexed_version: int | None
    """The version that searches read."""
    channel_id: UUID | None
    message_id: UUID | None
    """The message with which a person sent the newest version as a file; None if it was uploaded."""
    subject_id: str | None
    """The person."""


class DocumentOrigin(NamedTuple):
    """The message with which a person sent a file."""

    channel_id: UUID
    message_id: UUID
    subject_id: str


async def add(
    tx: Tx,
    id_: UUID,
    name: str,
    stored: Stored,
    *,
    audience: Sequence[str] = (ALL,),
    tags: Sequence[str] = (),
    created_by: str = "",
    origin: DocumentOrigin | None = None,
) -> StoredDocument:
    await tx.sql(
        """
        INSERT INTO document
            (id, tenant_id, name, content_type, size, sha256, path, status, audience, tags, created_by,
             channel_id, message_id, subject_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'stored', $8, $9, $10, $11, $12, $13)
        """,
        id_,
        tx.tenant_id,
        name,
        stored.content_type,
        stored.size,
        stored.sha256,
        stored.path,
        list(audience),
        list(tags),
        created_by,
        *(origin or (None, None, None)),
    )
    await storage.change(tx, stored.size)
    return await get(tx, id_)


# $1: the names of the client, or NULL for an administrator.
_VISIBLE = """
    d.deleted_at IS NULL
    AND d.replaces IS NULL
    AND ($1::text[] IS NULL OR d.audience && $1 OR d.created_by = ANY($1))
"""


async def get(tx: Tx, id_: UUID, names: Sequence[str] | None = None) -> StoredDocument:
    """Raises NotFound, also for a deleted document, for another tenant's, and for one that no one of these names may
    see. names: None for an administrator."""
    rows = await tx.sql(f"SELECT {_COLUMNS} FROM {NEWEST} WHERE {_VISIBLE} AND d.id = $2", names, id_)
    if not rows:
        raise NotFound(f"document {id_}: does not exist")
    return StoredDocument(*rows[0])


async def newest(
    tx: Tx, limit: int, before: tuple[datetime, UUID] | None, names: Sequence[str] | None
) -> list[StoredDocument]:
    """The newest documents that these names may see first, after the one that `before` names by time and id."""
    at, id_ = before or (None, None)
    rows = await tx.sql(
        f"""
        SELECT {_COLUMNS}
        FROM {NEWEST}
        WHERE {_VISIBLE} AND ($3::timestamptz IS NULL OR (d.created_at, d.id) < ($3, $4::uuid))
        ORDER BY d.created_at DESC, d.id DESC
        LIMIT $2
        """,
        names,
        limit,
        at,
        id_,
    )
    return [StoredDocument(*row) for row in rows]


async def change(tx: Tx, id_: UUID, audience: Sequence[str] | None, tags: Sequence[str] | None) -> StoredDocument:
    """Changes the readers and tags that are given; searches see the change from the commit on. Raises NotFound."""
    await tx.sql(
        """
        UPDATE document
        SET audience = coalesce($2, audience), tags = coalesce($3, tags)
        WHERE id = $1 AND deleted_at IS NULL
        """,
        id_,
        audience,
        tags,
    )
    return await get(tx, id_)


async def delete(tx: Tx, ids: Sequence[UUID]) -> None:
    """Hides the documents and their next versions from the commit on. Files, vectors and rows are removed later.

    ids: in their order. Raises NotFound."""
    for id_ in ids:
        await lock(tx, id_)
        rows = await tx.sql(
            """
            UPDATE document
            SET deleted_at = clock_timestamp()
            WHERE (id = $1 OR replaces = $1) AND deleted_at IS NULL
            RETURNING id
            """,
            id_,
        )
        for (row_id,) in rows:
            enqueue_document(tx, row_id, "remove")


async def made_of(tx: Tx, subject_id: str, message_id: UUID | None = None) -> list[UUID]:
    """The documents that were made of files of the person, or of one message."""
    rows = await tx.sql(
        """
        SELECT id FROM document
        WHERE tenant_id = $1 AND subject_id = $2 AND ($3::uuid IS NULL OR message_id = $3) AND deleted_at IS NULL
        ORDER BY id
        """,
        tx.tenant_id,
        subject_id,
        message_id,
    )
    return [id_ for (id_,) in rows]


async def lock(tx: Tx, id_: UUID) -> None:
    """Locks the document until the commit, so that its versions change one after the other. A transaction locks the
    document before the row of the next version. Raises NotFound."""
    if not await tx.sql("SELECT id FROM document WHERE id = $1 AND deleted_at IS NULL FOR UPDATE", id_):
        raise NotFound(f"document {id_}: does not exist")


class IndexedVersion(NamedTuple):
    """A version of a document on its way into the index."""

    id: UUID
    content_type: str
    path: str
    status: str
    replaces: UUID | None
    """The document whose next version it is."""
    owner: UUID
    """Of its rows in the index."""
    created_by: str
    channel_id: UUID | None
    """In which a person sent it as a file."""
    indexed_in: Sequence[str]
    """The names of the indexes that have all of its rows."""

    @property
    def origin(self) -> UseSource:
        return of_client(self.created_by, channel_id=self.channel_id)


async def version(tx: Tx, id_: UUID) -> IndexedVersion:
    """Raises NotFound, also for a deleted row."""
    rows = await tx.sql(
        """
        SELECT id, content_type, path, status, replaces, coalesce(index_owner, id), created_by, channel_id, indexed_in
        FROM document
        WHERE id = $1 AND deleted_at IS NULL
        """,
        id_,
    )
    if not rows:
        raise NotFound(f"document {id_}: does not exist")
    return IndexedVersion(*rows[0])


async def indexed_in(tx: Tx, index: str) -> tuple[int, int]:
    """The number of the tenant's indexed documents, and how many of them the index of this name has."""
    [(total, inside)] = await tx.sql(
        """
        SELECT count(*), count(*) FILTER (WHERE $2 = ANY(indexed_in))
        FROM document
        WHERE tenant_id = $1 AND status = 'indexed' AND deleted_at IS NULL
        """,
        tx.tenant_id,
        index,
    )
    return total, inside


async def mark_indexed(tx: Tx, version: IndexedVersion, indexes: Sequence[str]) -> bool:
    """Notes that the indexes of these names have all rows of the version. False if it was deleted or replaced."""
    return bool(
        await tx.sql(
            """
            UPDATE document
            SET indexed_in = ARRAY(SELECT unnest(indexed_in) UNION SELECT unnest($3::text[]) ORDER BY 1)
            WHERE id = $1 AND coalesce(index_owner, id) = $2 AND deleted_at IS NULL
            RETURNING 1
            """,
            version.id,
            version.owner,
            list(indexes),
        )
    )


async def purge(tx: Tx, id_: UUID) -> None:
    """Deletes the rows of the document and of its passages."""
    rows = await tx.sql("DELETE FROM document WHERE id = $1 RETURNING size", id_)
    for (size,) in rows:
        await storage.change(tx, -size)


async def advance(tx: Tx, id_: UUID, status: str, progress: float, error: str | None = None) -> bool:
    """Returns False if the document was deleted."""
    return bool(
        await tx.sql(
            """
            UPDATE document SET status = $2, progress = $3, error = $4 WHERE id = $1 AND deleted_at IS NULL
            RETURNING id
            """,
            id_,
            status,
            progress,
            error,
        )
    )


async def set_findings(
    tx: Tx, id_: UUID, pages: int | None, pages_without_text: Sequence[int], warnings: Sequence[str]
) -> None:
    """Stores the remarks of the parser about the document."""
    await tx.sql(
        "UPDATE document SET pages = $2, pages_without_text = $3, warnings = $4 WHERE id = $1",
        id_,
        pages,
        list(pages_without_text),
        list(warnings),
    )
