"""Reranks passages with an endpoint that reads query and passage together: ``POST {base_url}/rerank`` as Cohere
documents it (https://docs.cohere.com/reference/rerank); vLLM, Jina and others serve the same shape below ``/v1``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from infra.errors import InvalidMessage, Transient
from infra.outgoing.client import Outgoing
from services.memory.metering.usage import most_tokens, reported


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _Reply(msgspec.Struct):
    results: list[_Result]
    meta: Any = None
    """Of Cohere."""
    usage: Any = None
    """Of Jina and vLLM."""


class Ordered(NamedTuple):
    positions: list[int]
    """Of the texts, the most relevant first."""
    quantities: dict[str, int]
    """The billed amounts, in units of `UsageRecorded`: ``calls`` (search units) and, if reported,
    ``input_tokens``."""


class Reranker:
    def __init__(self, outgoing: Outgoing, base_url: str, model: str, api_key: str | None) -> None:
        self._outgoing = outgoing
        self._url = f"{base_url.rstrip('/')}/rerank"
        self.model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def order(self, query: str, texts: Sequence[str]) -> Ordered:
        """The order of the texts. Those without a score follow in their order.

        Raises Transient if the answer is of no use, and the errors of `Outgoing`.
        """
        try:
            answer = await self._outgoing.request(
                "POST",
                self._url,
                headers=self._headers,
                json={"model": self.model, "query": query, "documents": list(texts), "top_n": len(texts)},
                template="/rerank",
            )
        except InvalidMessage as error:
            # The operator's URL is wrong, and not the search of the person who would get this error.
            raise Transient(f"reranking endpoint: {error}") from error
        if answer.status != 200:
            raise Transient(f"reranking endpoint: HTTP {answer.status}")
        try:
            reply = msgspec.json.decode(answer.body, type=_Reply)
        except msgspec.DecodeError as error:
            raise Transient(f"reranking endpoint: invalid answer: {error}") from error
        results = reply.results
        scores = {result.index: result.relevance_score for result in results}
        if not scores or len(scores) < len(results) or not scores.keys() <= set(range(len(texts))):
            raise Transient("reranking endpoint: the answer does not have one score per passage")
        positions = sorted(range(len(texts)), key=lambda n: (n not in scores, -scores.get(n, 0.0)))
        return Ordered(positions, _quantities(reply, query, texts))


def _quantities(reply: _Reply, query: str, texts: Sequence[str]) -> dict[str, int]:
    billed = reply.meta.get("billed_units") if isinstance(reply.meta, dict) else None
    units = reported(billed, "search_units", len(texts))
    # The query is read with each text.
    tokens = reported(reply.usage, "total_tokens", most_tokens([query + text for text in texts]))
    # An endpoint that reports neither has ordered one list.
    found = {"calls": 1 if units is None else math.ceil(units)}
    return found if tokens is None else found | {"input_tokens": int(tokens)}
