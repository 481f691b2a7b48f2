"""The table of passages: the texts of documents and their vectors. Every index is built from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.clock import uuid7
from infra.postgres.tx import Tx
from services.memory.domain import Chunk, codes
from services.memory.languages import language


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
        """
        SELECT id, n, text, section FROM passage WHERE document_id = $1 AND model IS DISTINCT FROM $2
        ORDER BY n LIMIT $3
        """,
        document_id,
        model,
        limit,
    )
    return [StoredPassage(*row) for row in rows]


async def count(tx: Tx, document_id: UUID) -> int:
    [(number,)] = await tx.sql("SELECT count(*) FROM passage WHERE document_id = $1", document_id)
    return int(number)


async def set_vectors(tx: Tx, model: str, passages: Sequence[StoredPassage], vectors: NDArray[np.float32]) -> None:
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
