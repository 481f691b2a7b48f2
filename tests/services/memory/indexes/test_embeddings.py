"""Embeddings in the process, and by an OpenAI-shaped endpoint that checks its requests strictly."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from infra.clock import uuid7
from infra.errors import EffectFailed, RetryLater, Transient
from infra.observe.metrics import Metrics
from infra.outgoing.client import Outgoing
from infra.web.health import Health
from infra.web.http import create_app
from infra.web.server import serve_http
from protos.catalog import AGENT_EVENTS
from protos.messages.agent import RunCompleted
from services.memory.indexes.embeddings import LocalEmbedder, RemoteEmbedder
from services.memory.search.reranking import Reranker
from tests.services.memory.conftest import Client, Vectors
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import FakeBilling

DIMENSION = 8


class Endpoint:
    """``/v1/embeddings``: a vector per distinct word, summed. `answers` come first, each once. Vectors of other models
    than words-8 have nothing in common with its own."""

    def __init__(self) -> None:
        self.answers: list[JSONResponse] = []
        self.texts: list[str] = []
        self.failing: set[str] = set()
        """Models that are down."""
        self.refused = ""
        """Texts with this word are refused for good."""
        self.rerank_answers: list[JSONResponse | None] = []
        """None: no answer, until the caller gives up."""
        self.url = ""

    async def embed(self, request: Request) -> JSONResponse:
        if request.headers["authorization"] != "Bearer a key":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        body = await request.json()
        assert set(body) == {"model", "input", "encoding_format"}
        assert body["model"].startswith("words-")
        if body["model"] in self.failing:
            return JSONResponse({}, 503)
        if self.refused and any(self.refused in text for text in body["input"]):
            return JSONResponse({}, 400)
        if self.answers:
            return self.answers.pop(0)
        self.texts += body["input"]
        data = [
            {"object": "embedding", "index": n, "embedding": self.vector(text, body["model"])}
            for n, text in enumerate(body["input"])
        ]
        # In any order: only `index` counts.
        return JSONResponse({"data": data[::-1], "usage": {"prompt_tokens": len(body["input"]), "total_tokens": 0}})

    async def rerank(self, request: Request) -> JSONResponse:
        """``/v1/rerank``: the last document is the best. `rerank_answers` come first, each once."""
        assert request.headers["authorization"] == "Bearer a key"
        body = await request.json()
        assert set(body) == {"model", "query", "documents", "top_n"}
        if self.rerank_answers:
            answer = self.rerank_answers.pop(0)
            if answer is None:
                await request.receive()
            return answer or JSONResponse({})
        scores = [{"index": n, "relevance_score": n / 100} for n, _ in enumerate(body["documents"])]
        return JSONResponse({"id": "1", "results": scores})

    @staticmethod
    def vector(text: str, model: str = "words-8") -> list[float]:
        words = [hashlib.sha256(f"{model} {word}".encode()).digest()[:DIMENSION] for word in text.lower().split()]
        total = np.sum([np.frombuffer(word, np.uint8).astype(float) - 128 for word in words], axis=0)
        return [float(x) for x in total / np.linalg.norm(total)]


@pytest.fixture(scope="module")
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    routes = [
        Route("/v1/embeddings", endpoint.embed, methods=["POST"]),
        Route("/v1/rerank", endpoint.rerank, methods=["POST"]),
    ]
    server = await serve_http(create_app(routes, Health("x", "0"), Metrics(CollectorRegistry())), 0)
    endpoint.url = f"http://127.0.0.1:{server.port}/v1"
    yield endpoint
    await server.stop()


async def test_the_local_model_knows_what_a_text_is_about_in_both_languages() -> None:
    embedder = LocalEmbedder()
    texts = ["The warranty is 30 months.", "保修期为三十个月。", "The cat sleeps on the sofa.", "a\0b" * 5000]
    passages = await embedder.passages(texts)
    assert passages.vectors.shape == (4, 384)
    assert np.linalg.norm(passages.vectors, axis=1) == pytest.approx(1)
    for question in ("How long is the guarantee?", "保修多久？"):
        scores = passages.vectors @ (await embedder.queries([question]))[0].vectors[0]
        assert min(scores[:2]) > scores[2]
        assert max(scores) > embedder.min_similarity


async def test_of_a_long_query_the_local_model_reads_both_ends() -> None:
    """The searches of other tenants wait for it."""
    embedder = LocalEmbedder()
    others = "The lift of the north hall was painted in the spring of last year. " * 50
    [short] = await embedder.queries(["How long is the guarantee of the pump?"])
    for text in (
        f"{others} How long is the guarantee of the pump?",
        f"How long is the guarantee of the pump? {others}",
    ):
        [long] = await embedder.queries([text])
        assert long.tokens < 170
        passages = await embedder.passages(["The pump has a warranty of 30 months.", "The cat sleeps on the sofa."])
        right, wrong = passages.vectors @ long.vectors[0]
        assert right > wrong
    assert short.tokens < 20


ONE_FACT = (
    ("I live in Oslo.", "My home is in Oslo."),
    ("I live in Oslo.", "Oslo is where I live."),
    ("I am allergic to nuts.", "Nuts give me an allergic reaction."),
    ("I am a vegetarian.", "I don't eat meat."),
    ("My birthday is 4 May.", "I was born on the fourth of May."),
    ("I work at Norrland.", "Norrland is my employer."),
    ("I prefer tea to coffee.", "Tea is better than coffee for me."),
    ("My daughter is called Ada.", "I have a daughter named Ada."),
    ("I drive a Volvo.", "My car is a Volvo."),
    ("Call me in the morning.", "Mornings are best for calls."),
    ("我住在北京。", "我的家在北京。"),
    ("我对坚果过敏。", "吃坚果我会过敏。"),
    ("我是素食者。", "我不吃肉。"),
)
TWO_FACTS = (
    ("I live in Oslo.", "I live in Bergen."),
    ("I am allergic to nuts.", "I am allergic to milk."),
    ("I am a vegetarian.", "I am not a vegetarian."),
    ("My birthday is 4 May.", "My birthday is 5 May."),
    ("I work at Norrland.", "I work at Nordea."),
    ("I prefer tea to coffee.", "I prefer coffee to tea."),
    ("My daughter is called Ada.", "My son is called Ada."),
    ("I drive a Volvo.", "I drive a Toyota."),
    ("Call me in the morning.", "Call me in the evening."),
    ("我住在北京。", "我住在上海。"),
    ("我对坚果过敏。", "我对牛奶过敏。"),
    ("我是素食者。", "我不是素食者。"),
    ("I like tea.", "I hate tea."),
)


async def test_no_cosine_tells_one_fact_in_other_words_from_another_fact() -> None:
    """The reason of decision 22: memories are not merged because their vectors are near."""
    embedder = LocalEmbedder()

    async def cosines(pairs: Sequence[tuple[str, str]]) -> list[float]:
        vectors = (await embedder.passages([text for pair in pairs for text in pair])).vectors
        return [float(one @ other) for one, other in zip(vectors[::2], vectors[1::2], strict=True)]

    same, different = await cosines(ONE_FACT), await cosines(TWO_FACTS)
    assert max(different) > max(same)
    wrong = min(
        sum(cosine < least for cosine in same) + sum(cosine >= least for cosine in different)
        for least in (*same, *different)
    )
    assert wrong == 6


async def test_an_endpoints_answers_mean_what_they_say(endpoint: Endpoint) -> None:
    outgoing = Outgoing(allow_private=True)
    embedder = RemoteEmbedder(outgoing, endpoint.url, "words-8", "a key")
    embedded = await embedder.passages(["one", "two", "three"])
    assert embedded.tokens == 3
    assert embedded.vectors == pytest.approx(np.asarray([endpoint.vector(text) for text in ("one", "two", "three")]))

    endpoint.answers = [JSONResponse({}, 429, {"retry-after": "7"})]
    with pytest.raises(RetryLater) as later:
        await embedder.queries(["one"])
    assert later.value.after == timedelta(seconds=7)
    for answer in (
        JSONResponse({}, 429, {"retry-after": "9" * 30}),
        JSONResponse({}, 500),
        JSONResponse({"data": []}),
        JSONResponse({"data": [{"index": 0, "embedding": "AAAA"}]}),
        JSONResponse({"data": [{"index": 0, "embedding": [1, 2]}, {"index": 1, "embedding": [1]}]}),
    ):
        endpoint.answers = [answer]
        with pytest.raises(Transient):
            await embedder.queries(["one"])
    endpoint.answers = [JSONResponse({"error": {"message": "too long"}}, 400)]
    with pytest.raises(EffectFailed):
        await embedder.queries(["one"])
    with pytest.raises(Transient):
        await RemoteEmbedder(outgoing, endpoint.url, "words-8", "no key").queries(["one"])
    await outgoing.close()


@pytest.mark.parametrize("reported", [-1, 0, 10**12, 1e300, "many", True, None])
async def test_a_count_of_tokens_that_cannot_be_is_replaced_by_an_estimate(
    endpoint: Endpoint, reported: object
) -> None:
    outgoing = Outgoing(allow_private=True)
    embedder = RemoteEmbedder(outgoing, endpoint.url, "words-8", "a key")
    data = [{"index": 0, "embedding": [1.0, 2.0]}]
    usages: list[Any] = [{"prompt_tokens": reported}, [], None]
    for usage in usages:
        endpoint.answers = [JSONResponse({"data": data, "usage": usage})]
        assert (await embedder.passages(["one two three"])).tokens == 3
    endpoint.answers = [JSONResponse({"data": data, "usage": {"prompt_tokens": 7}})]
    assert (await embedder.passages(["one two three"])).tokens == 7
    await outgoing.close()


async def test_a_reranking_endpoint_is_believed_only_if_its_answer_fits(endpoint: Endpoint) -> None:
    outgoing = Outgoing(allow_private=True)
    reranker = Reranker(outgoing, endpoint.url, "ranks-1", "a key")
    assert await reranker.order("which?", ["a", "b", "c"]) == ([2, 1, 0], {"calls": 1})
    scored = {"results": [{"index": 1, "relevance_score": -3.5}]}
    cases: list[tuple[dict[str, Any], dict[str, int]]] = [
        ({"meta": {"billed_units": {"search_units": 2}}}, {"calls": 2}),
        ({"usage": {"total_tokens": 7}}, {"calls": 1, "input_tokens": 7}),
        ({"usage": None, "meta": {"billed_units": None}}, {"calls": 1}),
        *(
            ({"usage": {"total_tokens": wrong}, "meta": {"billed_units": {"search_units": wrong}}}, {"calls": 1})
            for wrong in (-1, 0, 10**12, 1e300, "many", True, None)
        ),
    ]
    for reported, quantities in cases:
        endpoint.rerank_answers = [JSONResponse(scored | reported)]
        assert await reranker.order("which?", ["a", "b", "c"]) == ([1, 0, 2], quantities)
    for answer in (
        JSONResponse({}, 429),
        JSONResponse({"results": []}),
        JSONResponse({"results": [{"index": 3, "relevance_score": 1}]}),
        JSONResponse({"results": [{"index": -1, "relevance_score": 1}]}),
        JSONResponse({"results": [{"index": 1, "relevance_score": 1}, {"index": 1, "relevance_score": 2}]}),
        JSONResponse({"results": [{"index": 0, "relevance_score": "high"}]}),
    ):
        endpoint.rerank_answers = [answer]
        with pytest.raises(Transient):
            await reranker.order("which?", ["a", "b", "c"])
    await outgoing.close()
    guarded = Outgoing(allow_private=False)
    with pytest.raises(Transient, match="public internet"):
        await Reranker(guarded, endpoint.url, "ranks-1", "a key").order("which?", ["a", "b"])
    await guarded.close()


async def test_another_model_takes_over_what_was_embedded_before(
    platform: Platform, vectors: Vectors, endpoint: Endpoint, billing: FakeBilling
) -> None:
    await platform.prepare("memory")
    await platform.start("memory")
    client = Client(platform, "tenant-of-words")
    document_id = await client.indexed("ferry.txt", b"The ferry leaves at nine.")
    assert platform.stop("memory") == 0

    await platform.start(
        "memory",
        CLAW_EMBEDDING_BASE_URL=endpoint.url,
        CLAW_EMBEDDING_MODEL="words-8",
        CLAW_EMBEDDING_API_KEY="a key",
        CLAW_RERANK_BASE_URL=endpoint.url,
        CLAW_RERANK_MODEL="ranks-1",
        CLAW_RERANK_API_KEY="a key",
    )

    async def found() -> bool:
        name = (await client.http.get("/api/v1/memory/index")).json()["name"]
        # By the model of the process until the endpoint's model has embedded everything.
        [passage] = await client.retrieve("the ferry leaves", mode="dense")
        assert passage.source.document_id == document_id
        return bool(name == "milvus/words-8")

    await platform.until(found)
    assert "The ferry leaves at nine." in endpoint.texts
    endpoint.answers = [JSONResponse({}, 503)]
    later = await client.indexed("bridge.txt", b"The bridge is closed.")

    async def searched() -> tuple[list[str], bool]:
        answer = (await client.http.post("/api/v1/memory/search", json={"query": "the ferry leaves"})).json()
        return [item["source"]["document_id"] for item in answer["items"]], answer["reranked"]

    # The endpoint has the last word, and without it the fused order stays.
    assert await searched() == ([later, document_id], True)
    endpoint.rerank_answers = [JSONResponse({}, 503), None]
    assert await searched() == ([document_id, later], False)
    assert await searched() == ([document_id, later], False)
    endpoint.answers = [JSONResponse({"error": {"message": "too long"}}, 400)]
    refused = await client.done(await client.upload("other.txt", b"something"))
    assert (refused["status"], refused["error"]) == (
        "failed",
        "The text could not be embedded: embedding endpoint: HTTP 400.",
    )
    said = RunCompleted(run_id=uuid7(), session_key="s", reply="The ferry waits.")
    await platform.produce(AGENT_EVENTS, said, key="s", tenant_id=client.tenant_id)

    async def reported() -> bool:
        records = [body for _, body in await platform.outbox("memory", "usage.records")]
        ids = {record["usage_id"] for record in records if record["resource"] == "embedding/words-8"}
        replies = [id_ for id_ in ids if id_.startswith("conversation/")]
        return f"{later}/0/2" in ids and len(replies) == 1

    await platform.until(reported)

    # Without credit, a reply and a memory are kept and not embedded.
    billing.dear.add("embedding/words-8")
    unpaid = RunCompleted(run_id=uuid7(), session_key="s", reply="The unpaid reply.")
    await platform.produce(AGENT_EVENTS, unpaid, key="s", tenant_id=client.tenant_id)
    noted = {"text": "The unpaid memory.", "scope": "tenant"}
    assert (await client.http.post("/api/v1/memories", json=noted)).status_code == 201

    async def refused_both() -> bool:
        async with platform.database("memory").begin() as tx:
            [(failed,)] = await tx.sql(
                "SELECT count(*) FROM lane_effect WHERE state = 'failed' AND error LIKE '%credit does not suffice%'"
            )
        return bool(failed == 2)

    await platform.until(refused_both)
    assert not any("unpaid" in text for text in endpoint.texts)
    await client.http.aclose()
    assert platform.stop("memory") == 0
