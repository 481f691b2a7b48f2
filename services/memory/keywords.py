"""Search by words in PostgreSQL, whose index is written in the transaction that writes the passages.

Ranked by BM25 (Robertson and Zaragoza, 2009): rare words count more, repeated words less and less, and long passages
less than short ones.

Only passages that the caller may read are counted, so no score tells anything about others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import log
from uuid import UUID

from infra.postgres.tx import Tx
from services.memory.languages import LANGUAGES
from services.memory.readable import READABLE, Scope

K1, B = 1.2, 0.75
# A longer query is searched by its longest words.
MAX_WORDS = 100
# So many passages with any word of the query are all read and ranked. Of more, the words are counted first.
READ = 500
# A word's passages and all passages are counted up to these numbers: a more common word hardly changes the order.
COUNTED, COUNTED_ALL = 1_000, 2_000
# Passages with any of the query's rarest words are candidates. So many of these words are taken that about this many
# passages have one.
CANDIDATES = 300

# A lookup for each passage of the index of words. As a join, the planner may read all documents first.
_MAY_READ = f"(SELECT {READABLE} FROM document d WHERE d.id = p.document_id)"
# The last row has the words of the query and the number of passages. The words are those of every language, because a
# query is too short to tell its own.
_READ = f"""
    WITH query AS MATERIALIZED (SELECT keyword_words($6, $7, {MAX_WORDS}) AS words),
    hit AS MATERIALIZED (
        SELECT p.id, p.words
        FROM passage p
        WHERE p.words @@ (SELECT keyword_any(words) && keyword_any(ARRAY[keyword_tenant($5)]) FROM query)
            AND p.tenant_id = $5
            AND {_MAY_READ}
        LIMIT {READ + 1}
    )
    SELECT id, words::text, NULL::text[], NULL::bigint
    FROM hit
    WHERE (SELECT count(*) FROM hit) <= {READ}
    UNION ALL
    SELECT NULL, NULL, (SELECT words FROM query), (
        SELECT count(*)
        FROM (
            SELECT
            FROM passage p
            JOIN document d ON d.id = p.document_id
            WHERE {READABLE} AND d.tenant_id = $5
            LIMIT {COUNTED_ALL}
        ) AS readable
    )
"""
_COUNT = f"""
    SELECT word, (
        SELECT count(*)
        FROM (SELECT FROM passage p WHERE p.words @@ wanted AND p.tenant_id = $5 AND {_MAY_READ} LIMIT {COUNTED}) AS hit
    )
    FROM (
        SELECT word, keyword_any(ARRAY[word]) && keyword_any(ARRAY[keyword_tenant($5)]) AS wanted
        FROM unnest($6::text[]) AS word
    ) AS query
"""
_RANK = f"""
    WITH query AS MATERIALIZED (
        SELECT keyword_any($6) AS words, keyword_any($6) && keyword_any(ARRAY[keyword_tenant($5)]) AS wanted
    )
    SELECT p.id, p.words::text
    FROM query, passage p
    WHERE p.words @@ query.wanted AND p.tenant_id = $5 AND {_MAY_READ}
    ORDER BY ts_rank(p.words, query.words) DESC, p.id
    LIMIT {CANDIDATES}
"""


async def with_words(tx: Tx, text: str, limit: int, scope: Scope) -> Mapping[UUID, float]:
    """The passages with words of the text, best first. The value is the share of the text's words that a passage has,
    weighted by their rarity: from 0 to 1.

    `tx` must be of the worker role. For a role that row-level security binds, PostgreSQL reads every passage of every
    tenant: it checks the tenant before it compares words, and does not use the index of words for that.
    """
    scoped = (*scope.parameters, tx.tenant_id)
    *hits, (_, _, words, total) = await tx.sql(_READ, *scoped, list(LANGUAGES), text)
    if not words:
        return {}
    rows = [(id_, vector) for id_, vector, *_ in hits]
    if rows:
        count_of = _counter(words)
        found = [count_of(vector) for _, vector in rows]
        counts: Mapping[str, int] = Counter(word for each in found for word in each)
    else:
        counts = {word: count for word, count in await tx.sql(_COUNT, *scoped, words) if count}
        if not counts:
            return {}
        rows = [(id_, vector) for id_, vector in await tx.sql(_RANK, *scoped, _rarest(counts))]
        count_of = _counter(counts)
        found = [count_of(vector) for _, vector in rows]
    # The inverse document frequency.
    weights = {word: log(1 + (total - min(count, total) + 0.5) / (count + 0.5)) for word, count in counts.items()}
    ranked = _ranked(rows, found, weights)
    whole = sum(weights.values())
    return {id_: share / whole for _, id_, share in ranked[:limit]}


def _ranked(
    rows: Sequence[tuple[UUID, str]], found: Sequence[Mapping[str, int]], weights: Mapping[str, float]
) -> list[tuple[float, UUID, float]]:
    """Negative score, id and weight of the words of each passage, best first. `found`: the words' counts in each."""
    lengths = [vector.count("':") + vector.count(",") for _, vector in rows]
    average = sum(lengths) / max(1, len(rows))
    ranked = []
    for (id_, _), length, counts in zip(rows, lengths, found, strict=True):
        flat = K1 * (1 - B + B * length / average)
        score = share = 0.0
        for word, count in counts.items():
            score += weights[word] * count * (K1 + 1) / (count + flat)
            share += weights[word]
        ranked.append((-score, id_, share))
    return sorted(ranked)


def _counter(words: Iterable[str]) -> Callable[[str], dict[str, int]]:
    """Counts the places of these words in the text of a vector, such as ``'machin':2,17 'valv':8``. Here, because to
    unpack the vectors in PostgreSQL took 17 of the 20 ms of a search."""
    # PostgreSQL doubles the quotes, which words of addresses may have.
    quoted = {word.replace("\\", "\\\\").replace("'", "''"): word for word in words}
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
