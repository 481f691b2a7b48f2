"""Reranks passages with an endpoint that reads query and passage together: ``POST {base_url}/rerank`` as Cohere
documents it (https://docs.cohere.com/reference/rerank); vLLM, Jina and others serve the same shape below ``/v1``."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from infra.errors import InvalidMessage, Transient
from infra.outgoing.client import Outgoing


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _Reply(msgspec.Struct):
    results: list[_Result]


class Reranker:
    def __init__(self, outgoing: Outgoing, base_url: str, model: str, api_key: str | None) -> None:
        self._outgoing = outgoing
        self._url = f"{base_url.rstrip('/')}/rerank"
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def order(self, query: str, texts: Sequence[str]) -> list[int]:
        """The positions of the texts, the most relevant first. Those without a score follow in their order.

        Raises Transient if the answer is of no use, and the errors of `Outgoing`.
        """
        try:
            answer = await self._outgoing.request(
                "POST",
                self._url,
                headers=self._headers,
                json={"model": self._model, "query": query, "documents": list(texts), "top_n": len(texts)},
                template="/rerank",
            )
        except InvalidMessage as error:
            # The operator's URL is wrong, and not the search of the person who would get this error.
            raise Transient(f"reranking endpoint: {error}") from error
        if answer.status != 200:
            raise Transient(f"reranking endpoint: HTTP {answer.status}")
        try:
            results = msgspec.json.decode(answer.body, type=_Reply).results
        except msgspec.DecodeError as error:
            raise Transient(f"reranking endpoint: invalid answer: {error}") from error
        scores = {result.index: result.relevance_score for result in results}
        if not scores or len(scores) < len(results) or not scores.keys() <= set(range(len(texts))):
            raise Transient("reranking endpoint: the answer does not have one score per passage")
        return sorted(range(len(texts)), key=lambda n: (n not in scores, -scores.get(n, 0.0)))
