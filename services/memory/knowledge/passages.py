"""The table of passages: the texts of documents and their vectors. Every index is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np

from infra.clock import uuid7
from infra.postgres.tx import Tx
from services.memory.domain import Chunk, codes
from services.memory.indexes import vectors
from services.memory.knowledge.languages import language


class StoredPassage(NamedTuple):
    id: UUID
    n: int
    text: str
    section: str | None


async def add(tx: Tx, document_id: UUID, first: int, chunks: Sequence[Chunk]) -> None:
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


async def drop(tx: Tx, document_id: UUID) -> None:
    await tx.sql("DELETE FROM passage WHERE document_id = $1", document_id)


async def without_vector(tx: Tx, document_id: UUID, model: str, limit: int) -> list[StoredPassage]:
    """The first passages that have no vector of this model yet."""
    rows = await tx.sql(
        f"""
        SELECT id, n, text, section
        FROM passage p
        WHERE document_id = $1 AND {vectors.of("$2", "p")} IS NULL
        ORDER BY n
        LIMIT $3
        """,
        document_id,
        model,
        limit,
    )
    return [StoredPassage(*row) for row in rows]


async def count(tx: Tx, document_id: UUID) -> int:
    [(number,)] = await tx.sql("SELECT count(*) FROM passage WHERE document_id = $1", document_id)
    return int(number)


async def with_vectors(
    tx: Tx, document_id: UUID, model: str, after: int, limit: int
) -> list[tuple[UUID, int, list[float]]]:
    """(id, n, vector) of the passages with a number above `after`, in order."""
    rows = await tx.sql(
        f"""
        SELECT id, n, {vectors.of("$2", "p")}
        FROM passage p
        WHERE document_id = $1 AND n > $3 AND $2 IN (model, other_model)
        ORDER BY n
        LIMIT $4
        """,
        document_id,
        model,
        after,
        limit,
    )
    return [(id_, n, np.frombuffer(vector, dtype="<f4").tolist()) for id_, n, vector in rows]
