"""The passages that a search may read. All texts of documents leave PostgreSQL through the condition `READABLE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.postgres.tx import Tx
from services.memory.indexes import vectors
from services.memory.rights import NO_FILTERS, Filters, Owners


class Found(NamedTuple):
    """A passage of an indexed document, or a reply in a conversation."""

    text: str
    document_id: UUID | None
    """None for a reply."""
    name: str
    section: str | None
    page: int | None
    version: int | None
    """Of the document."""


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
# Of so many documents the index is given the ids. With more, it is asked for more hits instead.
MAX_OWNERS = 1000


class Scope(NamedTuple):
    """The documents that a search reads."""

    names: tuple[str, ...]
    """Of the caller."""
    filters: Filters = NO_FILTERS

    @property
    def parameters(self) -> tuple[Any, ...]:
        ids, tags, since = self.filters
        return list(self.names), ids, tags, since


async def found(
    tx: Tx, ids: Sequence[UUID], scope: Scope, model: str, compared: Sequence[UUID]
) -> tuple[Mapping[UUID, Found], Mapping[UUID, NDArray[np.float32]]]:
    """The passages with these ids that the caller may read and the filters let pass; and the vectors of those of them
    that are to be `compared`, if the model has embedded them."""
    rows = await tx.sql(
        f"""
        SELECT
            p.id, p.text, d.id, d.name, p.section, p.page, d.version,
            CASE WHEN p.id = ANY($7::uuid[]) THEN {vectors.of("$6", "p")} END
        FROM passage p
        JOIN document d ON d.id = p.document_id
        WHERE {READABLE} AND p.id = ANY($5::uuid[])
        """,
        *scope.parameters,
        list(ids),
        model,
        list(compared),
    )
    embedded = {row[0]: np.frombuffer(row[-1], dtype="<f4") for row in rows if row[-1] is not None}
    return {row[0]: Found(*row[1:-1]) for row in rows}, embedded


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
        if len(rows) <= MAX_OWNERS:
            return Owners(without=tuple(id_ for (id_,) in rows))
    rows = await tx.sql(
        f"SELECT coalesce(d.index_owner, d.id) FROM document d WHERE {READABLE} AND d.tenant_id = $5 LIMIT $6",
        *scope.parameters,
        tx.tenant_id,
        MAX_OWNERS + 1,
    )
    return Owners(only=tuple(id_ for (id_,) in rows) if len(rows) <= MAX_OWNERS else None)


async def with_codes(tx: Tx, wanted: Sequence[str], model: str, limit: int, scope: Scope) -> Mapping[UUID, int]:
    """The passages with the most of these codes, in indexed documents, and the number of the codes that each has."""
    rows = await tx.sql(
        f"""
        SELECT p.id, cardinality(ARRAY(SELECT unnest(p.codes) INTERSECT SELECT unnest($6::text[]))) AS n
        FROM passage p
        JOIN document d ON d.id = p.document_id
        WHERE {READABLE} AND p.tenant_id = $5 AND p.codes && $6::text[] AND $7 IN (p.model, p.other_model)
        ORDER BY n DESC, p.id
        LIMIT $8
        """,
        *scope.parameters,
        tx.tenant_id,
        list(wanted),
        model,
        limit,
    )
    return dict(map(tuple, rows))
