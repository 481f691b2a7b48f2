"""Search by words in PostgreSQL, whose index is written in the transaction that writes the passages.

Ranked by BM25 (Robertson and Zaragoza, 2009): rare words count more, repeated words less and less, and long passages
less than short ones.

Only passages that the caller may read are counted, so no score tells anything about others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import log
from uuid import UUID

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
        SELECT keyword_any($5) AS words, keyword_any($5) && keyword_any(ARRAY[keyword_tenant($6)]) AS wanted
    )
    SELECT p.id, p.words::text
    FROM query, passage p
    WHERE p.words @@ query.wanted AND {_MAY_READ}
    ORDER BY ts_rank(p.words, query.words) DESC, p.id
    LIMIT {CANDIDATES}
"""


async def with_words(tx: Tx, text: str, limit: int, scope: Scope) -> Mapping[UUID, float]:
    """The passages with words of the text, best first. The value is the share of the text's words that a passage has,
    weighted by their rarity: from 0 to 1."""
    rows = await tx.sql(_COUNT, *scope.parameters, list(LANGUAGES), text, tx.tenant_id)
    total = max(count for word, count in rows if word is None)
    counts = {word: count for word, count in rows if word and count}
    if not counts:
        return {}
    # The inverse document frequency.
    weights = {word: log(1 + (total - min(count, total) + 0.5) / (count + 0.5)) for word, count in counts.items()}
    rows = await tx.sql(_RANK, *scope.parameters, _rarest(counts), tx.tenant_id)
    # Read here, because to unpack the vectors in PostgreSQL took 17 of the 20 ms of a search.
    lengths = [vector.count("':") + vector.count(",") for _, vector in rows]
    average = sum(lengths) / max(1, len(rows))
    count_of = _counter(weights)
    ranked = []
    for (id_, vector), length in zip(rows, lengths, strict=True):
        found = count_of(vector)
        flat = K1 * (1 - B + B * length / average)
        score = sum(weights[word] * count * (K1 + 1) / (count + flat) for word, count in found.items())
        ranked.append((-score, id_, sum(weights[word] for word in found)))
    whole = sum(weights.values())
    return {id_: share / whole for _, id_, share in sorted(ranked)[:limit]}


def _counter(words: Iterable[str]) -> Callable[[str], dict[str, int]]:
    """Counts the places of these words in the text of a vector, such as ``'machin':2,17 'valv':8``."""
    # PostgreSQL doubles the quotes, which words of addresses may have.
    quoted = {word.replace("'", "''"): word for word in words}
    places = re.compile(rf"'({'|'.join(map(re.escape, quoted))})':([0-9,]+)")
    return lambda vector: {quoted[word]: found.count(",") + 1 for word, found in places.findall(vector)}


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
