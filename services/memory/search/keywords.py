"""Search by words in PostgreSQL, whose index is written in the transaction that writes the passages.

Ranked by BM25 (Robertson and Zaragoza, 2009): rare words count more, repeated words less and less, and long passages
less than short ones.

Only passages that the caller may read are counted, so no score tells anything about others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from heapq import nsmallest
from itertools import chain
from typing import Any
from uuid import UUID

import numpy as np

from infra.postgres.tx import Tx
from services.memory.knowledge.languages import LANGUAGES
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

# The words of so many texts are kept, for questions that are asked again. They depend on nothing else.
KNOWN = 2_000
_known: dict[str, str] = {}

# A lookup for each passage of the index of words. As a join, the planner may read all documents first.
_MAY_READ = f"(SELECT {READABLE} FROM document d WHERE d.id = p.document_id)"
# Of a passage, only the words that the query has, with their places: ``'machin':1A,3A 'valv':8A``. To unpack whole
# vectors took 17 of the 20 ms of a search in PostgreSQL, and half of the ranking here.
_WORDS_IN = "ts_filter(setweight(p.words, 'A', {words}), '{{a}}')::text"
# The number of places in the vector: in its binary form, each takes two bytes.
_LENGTH = "(octet_length(tsvectorsend(words)) - octet_length(tsvectorsend(strip(words)))) / 2"
# A row for each text, in their order. Its words are those of every language, because a query is too short to tell its
# own.
_READ = f"""
    WITH query AS MATERIALIZED (
        SELECT
            n,
            words,
            CASE WHEN words IS NOT NULL THEN keyword_any(words) && keyword_any(ARRAY[keyword_tenant($5)]) END AS wanted
        FROM (
            SELECT n, coalesce(string_to_array(known, E'\\n'), keyword_words($6, text, {MAX_WORDS})) AS words
            FROM unnest($7::text[], $8::text[]) WITH ORDINALITY AS asked (text, known, n)
            OFFSET 0
        ) AS asked
    )
    SELECT
        query.words,
        (
            SELECT count(*)
            FROM (
                SELECT
                FROM passage p
                JOIN document d ON d.id = p.document_id
                WHERE {READABLE} AND d.tenant_id = $5
                LIMIT {COUNTED_ALL}
            ) AS readable
        ),
        hit.*
    FROM query
    CROSS JOIN LATERAL (
        WITH p AS MATERIALIZED (
            SELECT p.id, p.words
            FROM passage p
            WHERE p.words @@ query.wanted AND p.tenant_id = $5 AND {_MAY_READ}
            LIMIT {READ + 1}
        )
        SELECT array_agg(id), array_agg({_WORDS_IN.format(words="query.words")}), array_agg({_LENGTH})
        FROM p
        WHERE (SELECT count(*) FROM p) <= {READ}
    ) AS hit
    ORDER BY query.n
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
    ),
    p AS (
        SELECT p.id, p.words
        FROM query, passage p
        WHERE p.words @@ query.wanted AND p.tenant_id = $5 AND {_MAY_READ}
        ORDER BY ts_rank(p.words, query.words) DESC, p.id
        LIMIT {CANDIDATES}
    )
    SELECT array_agg(id), array_agg({_WORDS_IN.format(words="$7::text[]")}), array_agg({_LENGTH})
    FROM p
"""
_PLACES = re.compile(r"'([^']*(?:''[^']*)*)':([0-9A,]+)")


async def with_words(tx: Tx, texts: Sequence[str], limit: int, scope: Scope) -> list[Mapping[UUID, float]]:
    """For each text the passages with its words, best first. The value is the share of the text's words that a passage
    has, weighted by their rarity: from 0 to 1.

    `tx` must be of the worker role. For a role that row-level security binds, PostgreSQL reads every passage of every
    tenant: it checks the tenant before it compares words, and does not use the index of words for that.
    """
    scoped = (*scope.parameters, tx.tenant_id)
    rows = await tx.sql(_READ, *scoped, list(LANGUAGES), list(texts), list(map(_known.get, texts)))
    for text, (words, *_) in zip(texts, rows, strict=True):
        if words and text not in _known:
            _known[text] = "\n".join(words)
            if len(_known) > KNOWN:
                del _known[next(iter(_known))]
    return [await _with_words(tx, scoped, limit, *row) for row in rows]


async def _with_words(
    tx: Tx,
    scoped: Sequence[Any],
    limit: int,
    words: Sequence[str],
    total: int,
    ids: Sequence[UUID] | None,
    places: Sequence[str],
    lengths: Sequence[int],
) -> Mapping[UUID, float]:
    counts: Mapping[str, int] | None = None
    if ids is None and words:
        # Of no passage, or of too many.
        counts = {word: count for word, count in await tx.sql(_COUNT, *scoped, words) if count}
        if words := list(counts):
            [(ids, places, lengths)] = await tx.sql(_RANK, *scoped, _rarest(counts), words)
    return {} if ids is None else _ranked(ids, places, lengths, words, total, counts, limit)


def _ranked(
    ids: Sequence[UUID],
    places: Sequence[str],
    lengths: Sequence[int],
    words: Sequence[str],
    total: int,
    counts: Mapping[str, int] | None,
    limit: int,
) -> dict[UUID, float]:
    """The best passages and the shares of the words that they have. `counts`: the passages with each word, if these are
    not all of them."""
    # PostgreSQL doubles the quotes and backslashes, which words of addresses may have.
    column = {word.replace("\\", "\\\\").replace("'", "''"): n for n, word in enumerate(words)}
    found = [_PLACES.findall(each) for each in places]
    rows = np.repeat(np.arange(len(ids)), [len(each) for each in found])
    having_word, having_places = zip(*chain.from_iterable(found), strict=True)
    columns = np.array(list(map(column.__getitem__, having_word)))
    times = np.array([where.count(",") + 1 for where in having_places])
    having = np.bincount(columns) if counts is None else np.array(list(counts.values()))
    # The inverse document frequency.
    weights = np.log(1 + (total - np.minimum(having, total) + 0.5) / (having + 0.5))
    flat = K1 * (1 - B + B * np.array(lengths) / np.mean(lengths))
    scores = np.bincount(rows, weights[columns] * times * (K1 + 1) / (times + flat[rows]))
    shares = np.bincount(rows, weights[columns]) / weights[having > 0].sum()
    best = nsmallest(limit, zip((-scores).tolist(), ids, shares.tolist(), strict=True))
    return {id_: share for _, id_, share in best}


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
