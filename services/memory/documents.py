"""The tables of documents and passages in PostgreSQL, the source of truth for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.stores.objects import Stored
from services.memory import storage
from services.memory.domain import Chunk, codes
from services.memory.languages import language
from services.memory.rights import ALL, NO_FILTERS, Filters, Owners

# The columns of `Document`. `d` is the document; `n` is its next version, or the document if it has none. The path of
# the file is that of the version which is searched.
_COLUMNS = """
    d.id, n.name, n.content_type, n.size, CASE WHEN d.status = 'indexed' THEN d.path ELSE n.path END, n.status,
    round(n.progress::numeric, 4)::float8, n.error, d.created_at, n.pages, n.pages_without_text, n.warnings,
    d.audience, d.tags, n.version, CASE WHEN d.status = 'indexed' THEN d.version END
"""
_NEWEST = """
    document d
    JOIN document n ON n.id = coalesce(
        (SELECT next.id FROM document next WHERE next.replaces = d.id AND next.deleted_at IS NULL), d.id
    )
"""


class Document(NamedTuple):
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


class Passage(NamedTuple):
    id: UUID
    n: int
    text: str
    section: str | None


class Found(NamedTuple):
    """A passage of an indexed document, or a reply in a conversation."""

    text: str
    document_id: UUID | None
    """None for a reply."""
    name: str
    section: str | None
    page: int | None


async def add(
    tx: Tx,
    id_: UUID,
    name: str,
    stored: Stored,
    *,
    audience: Sequence[str] = (ALL,),
    tags: Sequence[str] = (),
    created_by: str = "",
) -> Document:
    await tx.sql(
        """
        INSERT INTO document
            (id, tenant_id, name, content_type, size, sha256, path, status, audience, tags, created_by)
        VALUES ($1, $2, $3, $4, $5, $6, $7, 'stored', $8, $9, $10)
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
    )
    await storage.change(tx, stored.size)
    return await get(tx, id_)


# $1: the names of the client, or NULL for an administrator.
_VISIBLE = """
    d.deleted_at IS NULL
    AND d.replaces IS NULL
    AND ($1::text[] IS NULL OR d.audience && $1 OR d.created_by = ANY($1))
"""


async def get(tx: Tx, id_: UUID, names: Sequence[str] | None = None) -> Document:
    """Raises NotFound, also for a deleted document, for another tenant's, and for one that no one of these names may
    see. names: None for an administrator."""
    rows = await tx.sql(f"SELECT {_COLUMNS} FROM {_NEWEST} WHERE {_VISIBLE} AND d.id = $2", _array(names), id_)
    if not rows:
        raise NotFound(f"document {id_}: does not exist")
    return Document(*rows[0])


async def newest(
    tx: Tx, limit: int, before: tuple[datetime, UUID] | None, names: Sequence[str] | None
) -> list[Document]:
    """The newest documents that these names may see first, after the one that `before` names by time and id."""
    at, id_ = before or (None, None)
    rows = await tx.sql(
        f"""
        SELECT {_COLUMNS}
        FROM {_NEWEST}
        WHERE {_VISIBLE} AND ($3::timestamptz IS NULL OR (d.created_at, d.id) < ($3, $4::uuid))
        ORDER BY d.created_at DESC, d.id DESC
        LIMIT $2
        """,
        _array(names),
        limit,
        at,
        id_,
    )
    return [Document(*row) for row in rows]


async def change(tx: Tx, id_: UUID, audience: Sequence[str] | None, tags: Sequence[str] | None) -> Document:
    """Changes the readers and tags that are given; searches see the change from the commit on. Raises NotFound."""
    await tx.sql(
        """
        UPDATE document
        SET audience = coalesce($2, audience), tags = coalesce($3, tags)
        WHERE id = $1 AND deleted_at IS NULL
        """,
        id_,
        _array(audience),
        _array(tags),
    )
    return await get(tx, id_)


async def delete(tx: Tx, id_: UUID) -> list[UUID]:
    """Hides the document and its next version from the commit on. Returns the ids of their rows; files, vectors and
    rows are removed later. Raises NotFound."""
    await _lock(tx, id_)
    rows = await tx.sql(
        """
        UPDATE document
        SET deleted_at = clock_timestamp()
        WHERE (id = $1 OR replaces = $1) AND deleted_at IS NULL
        RETURNING id
        """,
        id_,
    )
    return [row_id for (row_id,) in rows]


async def _lock(tx: Tx, id_: UUID) -> None:
    """Locks the document until the commit, so that its versions change one after the other. A transaction locks the
    document before the row of the next version. Raises NotFound."""
    if not await tx.sql("SELECT id FROM document WHERE id = $1 AND deleted_at IS NULL FOR UPDATE", id_):
        raise NotFound(f"document {id_}: does not exist")


async def replace(
    tx: Tx, id_: UUID, next_id: UUID, name: str, stored: Stored, created_by: str
) -> tuple[bool, UUID | None]:
    """Adds `stored` as the document's next version, in a row `next_id` of its own until it is indexed.

    Returns whether it was added, and the row of a waiting version that is given up for it. It is not added if the
    newest version has the same bytes and has not failed. Raises NotFound.
    """
    await _lock(tx, id_)
    [(newest_id, sha256, status, version)] = await tx.sql(
        f"SELECT n.id, n.sha256, n.status, n.version FROM {_NEWEST} WHERE d.id = $1", id_
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
        await _lock(tx, document_id)
    except NotFound:
        return None
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
            index_owner = n.id, indexed_in = n.indexed_in
        FROM document n
        WHERE d.id = $1 AND n.id = $2
        """,
        document_id,
        next_id,
    )
    await tx.sql("DELETE FROM document WHERE id = $1", next_id)
    await storage.change(tx, -size)
    return OldVersion(*old)


class Work(NamedTuple):
    """A version of a document on its way into the index."""

    id: UUID
    content_type: str
    path: str
    status: str
    replaces: UUID | None
    """The document whose next version it is."""
    owner: UUID
    """Of its rows in the index."""


async def work(tx: Tx, id_: UUID) -> Work:
    """Raises NotFound, also for a deleted row."""
    rows = await tx.sql(
        """
        SELECT id, content_type, path, status, replaces, coalesce(index_owner, id)
        FROM document
        WHERE id = $1 AND deleted_at IS NULL
        """,
        id_,
    )
    if not rows:
        raise NotFound(f"document {id_}: does not exist")
    return Work(*rows[0])


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


async def mark_indexed(tx: Tx, id_: UUID, indexes: Sequence[str]) -> None:
    """Notes that the indexes of these names have all rows of the document."""
    await tx.sql(
        """
        UPDATE document
        SET indexed_in = ARRAY(SELECT unnest(indexed_in) UNION SELECT unnest($2::text[]) ORDER BY 1)
        WHERE id = $1
        """,
        id_,
        list(indexes),
    )


async def place(tx: Tx, id_: UUID) -> OldVersion | None:
    """The place of the document's file and rows, also of a deleted document; None if its row is gone."""
    rows = await tx.sql("SELECT path, coalesce(index_owner, id) FROM document WHERE id = $1", id_)
    return OldVersion(*rows[0]) if rows else None


async def reuse_vectors(tx: Tx, next_id: UUID, document_id: UUID, model: str) -> None:
    """Gives the passages of the next version the vectors of the same passages of the version before."""
    await tx.sql(
        """
        UPDATE passage p
        SET model = o.model, vector = o.vector
        FROM passage o
        WHERE p.document_id = $1 AND p.vector IS NULL AND o.document_id = $2 AND o.model = $3
            AND o.text = p.text AND o.section IS NOT DISTINCT FROM p.section
        """,
        next_id,
        document_id,
        model,
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


async def add_passages(tx: Tx, document_id: UUID, first: int, chunks: Sequence[Chunk]) -> None:
    await tx.sql(
        # One text of codes per passage: PostgreSQL refuses an array of arrays of different lengths.
        """
        INSERT INTO passage (id, tenant_id, document_id, n, text, section, page, codes, language)
        SELECT i, $1, $2, n, t, s, p, string_to_array(c, ' '), l FROM unnest($3::uuid[], $4::int[], $5::text[],
        $6::text[], $7::int[], $8::text[], $9::text[]) AS c(i, n, t, s, p, c, l)
        """,
        tx.tenant_id,
        document_id,
        [uuid7() for _ in chunks],
        list(range(first, first + len(chunks))),
        [chunk.text for chunk in chunks],
        [chunk.section for chunk in chunks],
        [chunk.page for chunk in chunks],
        [" ".join(codes(f"{chunk.section or ''} {chunk.text}")) for chunk in chunks],
        [language(chunk.text) for chunk in chunks],
    )


async def drop_passages(tx: Tx, document_id: UUID) -> None:
    await tx.sql("DELETE FROM passage WHERE document_id = $1", document_id)


async def without_vector(tx: Tx, document_id: UUID, model: str, limit: int) -> list[Passage]:
    """The first passages that have no vector of this model yet."""
    rows = await tx.sql(
        """
        SELECT id, n, text, section FROM passage WHERE document_id = $1 AND model IS DISTINCT FROM $2
        ORDER BY n LIMIT $3
        """,
        document_id,
        model,
        limit,
    )
    return [Passage(*row) for row in rows]


async def passage_count(tx: Tx, document_id: UUID) -> int:
    [(count,)] = await tx.sql("SELECT count(*) FROM passage WHERE document_id = $1", document_id)
    return int(count)


async def set_vectors(tx: Tx, model: str, passages: Sequence[Passage], vectors: NDArray[np.float32]) -> None:
    await tx.sql(
        """
        UPDATE passage p SET model = $1, vector = v.vector FROM unnest($2::uuid[], $3::bytea[]) AS v(id, vector)
        WHERE p.id = v.id
        """,
        model,
        [passage.id for passage in passages],
        [vector.tobytes() for vector in vectors],
    )


async def vectors(tx: Tx, document_id: UUID, after: int, limit: int) -> list[tuple[UUID, int, list[float]]]:
    """(id, n, vector) of the passages with a number above `after`, in order."""
    rows = await tx.sql(
        "SELECT id, n, vector FROM passage WHERE document_id = $1 AND n > $2 ORDER BY n LIMIT $3",
        document_id,
        after,
        limit,
    )
    return [(id_, n, np.frombuffer(vector, dtype="<f4").tolist()) for id_, n, vector in rows]


# The documents `d` that a search reads. Every text of a passage passes this condition: the index may be wrong about
# rights, deletion and versions. $1 to $4 are `Scope.parameters`.
READABLE = """
        d.status = 'indexed'
        AND d.deleted_at IS NULL
        AND d.audience && $1::text[]
        AND ($2::uuid[] IS NULL OR d.id = ANY($2))
        AND ($3::text[] IS NULL OR d.tags @> $3)
        AND ($4::timestamptz IS NULL OR d.created_at >= $4)
"""
# Of so many documents the index is told the ids. With more, it is asked for more hits instead.
MAX_OWNERS = 1000


class Scope(NamedTuple):
    """The documents that a search reads."""

    names: Sequence[str]
    """Of the caller."""
    filters: Filters = NO_FILTERS

    @property
    def parameters(self) -> tuple[Any, ...]:
        ids, tags, since = self.filters
        return list(self.names), _array(ids), _array(tags), since


async def found(tx: Tx, ids: Sequence[UUID], scope: Scope) -> Mapping[UUID, Found]:
    """The passages with these ids that the caller may read and the filters let pass."""
    rows = await tx.sql(
        f"""
        SELECT p.id, p.text, d.id, d.name, p.section, p.page
        FROM passage p
        JOIN document d ON d.id = p.document_id
        WHERE {READABLE} AND p.id = ANY($5::uuid[])
        """,
        *scope.parameters,
        list(ids),
    )
    return {id_: Found(*rest) for id_, *rest in rows}


async def owners(tx: Tx, scope: Scope) -> Owners:
    """The documents to which a search in the index is narrowed, by the owners of their rows there. It only saves hits
    that `found` would drop."""
    if scope.filters == NO_FILTERS:
        rows = await tx.sql(
            """
            SELECT coalesce(index_owner, id)
            FROM document
            WHERE tenant_id = $1 AND audience <> '{all}' AND NOT audience && $2::text[] AND deleted_at IS NULL
            LIMIT $3
            """,
            tx.tenant_id,
            list(scope.names),
            MAX_OWNERS + 1,
        )
        return Owners(without=tuple(id_ for (id_,) in rows) if len(rows) <= MAX_OWNERS else ())
    rows = await tx.sql(
        f"SELECT coalesce(d.index_owner, d.id) FROM document d WHERE {READABLE} AND d.tenant_id = $5 LIMIT $6",
        *scope.parameters,
        tx.tenant_id,
        MAX_OWNERS + 1,
    )
    return Owners(only=tuple(id_ for (id_,) in rows) if len(rows) <= MAX_OWNERS else None)


async def with_codes(
    tx: Tx, wanted: Sequence[str], model: str, limit: int, scope: Scope
) -> list[tuple[UUID, int, NDArray[np.float32]]]:
    """(id, number of matching codes, vector) of the passages with the most of these codes, in indexed documents."""
    rows = await tx.sql(
        f"""
        SELECT p.id, cardinality(ARRAY(SELECT unnest(p.codes) INTERSECT SELECT unnest($5::text[]))) AS n, p.vector
        FROM passage p
        JOIN document d ON d.id = p.document_id
        WHERE {READABLE} AND p.codes && $5::text[] AND p.model = $6
        ORDER BY n DESC, p.id
        LIMIT $7
        """,
        *scope.parameters,
        list(wanted),
        model,
        limit,
    )
    return [(id_, n, np.frombuffer(vector, dtype="<f4")) for id_, n, vector in rows]


def _array(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)
