"""Search by words in PostgreSQL, whose index is written in the transaction that writes the passages.

Ranked by BM25 (Robertson and Zaragoza, 2009): rare words count more, repeated words less and less, and long passages
less than short ones.

Only passages that the caller may read are counted, so no score tells anything about others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from infra.postgres.tx import Tx
from services.memory.languages import LANGUAGES
from services.memory.readable import READABLE, Scope

K1, B = 1.2, 0.75
# A longer query is searched by its longest words.
MAX_WORDS = 100
# A word's passages and all passages are counted up to these numbers: a more common word hardly changes the order.
COUNTED, COUNTED_ALL = 1_000, 2_000
# Passages with any of the query's rarest words are candidates. So many of these words are taken that about this many
# passages have one.
CANDIDATES = 300

# A lookup for each passage of the index of words. As a join, the planner may read all documents first.
_MAY_READ = f"(SELECT {READABLE} FROM document d WHERE d.id = p.document_id)"
# The words of the query in every language, because a query is too short to tell its own.
_COUNT = f"""
    WITH query AS MATERIALIZED (
        SELECT lexeme, keyword_any(ARRAY[lexeme]) && keyword_any(ARRAY[keyword_tenant($7)]) AS wanted
        FROM (
            SELECT DISTINCT lexeme
            FROM unnest($5::text[]) AS language, unnest(keyword_vector('', language, $6))
            WHERE positions IS NOT NULL
        ) AS words
        ORDER BY length(lexeme) DESC, lexeme
        LIMIT {MAX_WORDS}
    )
    SELECT lexeme, (
        SELECT count(*)
        FROM (SELECT FROM passage p WHERE p.words @@ query.wanted AND {_MAY_READ} LIMIT {COUNTED}) AS with_word
    )
    FROM query
    UNION ALL
    SELECT NULL, count(*)
    FROM (
        SELECT
        FROM passage p
        JOIN document d ON d.id = p.document_id
        WHERE {READABLE} AND d.tenant_id = $7
        LIMIT {COUNTED_ALL}
    ) AS readable
"""
_RANK = f"""
    WITH query AS MATERIALIZED (
        SELECT keyword_any($5) AS words, keyword_any($5) && keyword_any(ARRAY[keyword_tenant($7)]) AS wanted
    ),
    candidate AS (
        SELECT p.id, p.vector, p.model, p.words
        FROM query, passage p
        WHERE p.words @@ query.wanted AND {_MAY_READ}
        ORDER BY ts_rank(p.words, query.words) DESC, p.id
        LIMIT {CANDIDATES}
    )
    SELECT candidate.id, candidate.vector, candidate.model, places.total, places.words, places.counts
    FROM candidate,
    LATERAL (
        SELECT
            sum(cardinality(positions)) AS total,
            array_agg(lexeme) FILTER (WHERE lexeme = ANY($6::text[])) AS words,
            array_agg(cardinality(positions)) FILTER (WHERE lexeme = ANY($6::text[])) AS counts
        FROM unnest(candidate.words)
    ) AS places
"""


class Worded(NamedTuple):
    """A passage that has words of a query."""

    id: UUID
    rank: float
    """The share of the query's words that it has, weighted by their rarity: from 0 to 1."""
    vector: NDArray[np.float32] | None
    model: str | None


async def with_words(tx: Tx, text: str, limit: int, scope: Scope) -> list[Worded]:
    """The passages with words of the text, best first."""
    rows = await tx.sql(_COUNT, *scope.parameters, list(LANGUAGES), text, tx.tenant_id)
    total = max(count for word, count in rows if word is None)
    counts = {word: count for word, count in rows if word and count}
    if not counts:
        return []
    # The inverse document frequency.
    weights = {word: log(1 + (total - min(count, total) + 0.5) / (count + 0.5)) for word, count in counts.items()}
    rows = await tx.sql(_RANK, *scope.parameters, _rarest(counts), list(weights), tx.tenant_id)
    average = float(sum(row[3] for row in rows)) / max(1, len(rows))

    def score(row: Sequence[Any]) -> float:
        length = K1 * (1 - B + B * float(row[3]) / average)
        found = zip(row[4], row[5], strict=True)
        return float(sum(weights[word] * count * (K1 + 1) / (count + length) for word, count in found))

    whole = sum(weights.values())
    ranked = sorted(rows, key=lambda row: (-score(row), row[0]))[:limit]
    return [_worded(row, sum(weights[word] for word in row[4]) / whole) for row in ranked]


def _rarest(counts: Mapping[str, int]) -> list[str]:
    """The rarest words that together have CANDIDATES passages."""
    chosen: list[str] = []
    candidates = 0
    for word, count in sorted(counts.items(), key=lambda item: item[1]):
        if candidates >= CANDIDATES:
            break
        chosen.append(word)
        candidates += count
    return chosen


def _worded(row: Sequence[Any], rank: float) -> Worded:
    vector = row[1]
    return Worded(row[0], rank, None if vector is None else np.frombuffer(vector, dtype="<f4"), row[2])
