"""Log lines, events and spans in a real OpenSearch, checked with its official client."""

from __future__ import annotations

import gzip
import time
from base64 import urlsafe_b64encode
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from aiokafka import AIOKafkaProducer
from opensearchpy import OpenSearch
from opensearchpy.exceptions import TransportError
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags

from infra.clock import utcnow, uuid7
from protos.catalog import AGENT_EVENTS, CHANNEL_EVENTS, SERVICE_LOGS
from protos.envelope import Envelope, Message
from protos.messages.agent import RunCompleted, RunStarted
from protos.messages.channel import MessageReceived
from protos.messages.logs import LogLine
from protos.topology import Topic
from tooling.testing.platform import Platform


def line(message: str, *, tenant: str | None = None, at: datetime | None = None, **fields: Any) -> LogLine:
    timestamp = (at or utcnow()).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    data = {"tenant": tenant} if tenant else {}
    defaults: dict[str, Any] = {"level": "info", "service": "agent", "trace_id": None, "span_id": None, "data": data}
    return LogLine(timestamp=timestamp, message=message, **(defaults | fields))


async def log(aggregator: Platform, *lines: LogLine) -> None:
    for one in lines:
        await aggregator.produce(SERVICE_LOGS, one, key=one.service)


async def found(aggregator: Platform, tenant: str, count: int, **params: str) -> list[dict[str, Any]]:
    """Waits until the search finds that many lines. Returns them."""
    async with aggregator.client("log_aggregator", tenant) as client:

        async def ask() -> list[dict[str, Any]] | None:
            answer = await client.get("/api/v1/logs", params=params)
            assert answer.status_code == 200, answer.text
            items: list[dict[str, Any]] = answer.json()["items"]
            return items if len(items) >= count else None

        items = await aggregator.until(ask)
    assert items is not None
    return items


async def raw(
    aggregator: Platform, topic: Topic, body: bytes, headers: dict[str, str], key: bytes | None = None
) -> None:
    async with AIOKafkaProducer(bootstrap_servers=aggregator.stack.kafka_bootstrap_servers) as producer:
        pairs = [(name, value.encode()) for name, value in headers.items()]
        await producer.send_and_wait(aggregator.prefix + topic.name, body, key=key, headers=pairs)


async def dead_letters(aggregator: Platform) -> set[tuple[Any, ...]]:
    """Returns message id and state of the messages that could not be indexed."""
    async with aggregator.database("log_aggregator").begin() as tx:
        return set(await tx.sql("SELECT message_id, state FROM dead_letter WHERE destination = 'service.logs'"))


async def event(aggregator: Platform, topic: Topic, message: Message, tenant_id: str, trace_id: str) -> None:
    """Sends an event with its trace, like the relay."""
    envelope = Envelope(
        id=uuid7(),
        source=topic.producers[0],
        type=message.wire_name(),
        time=utcnow(),
        tenant_id=tenant_id,
        traceparent=f"00-{trace_id}-{'1' * 16}-01",
    )
    await raw(aggregator, topic, msgspec.json.encode(message), envelope.headers(), key=b"k")


async def test_a_line_is_found_as_it_was_written(aggregator: Platform, tenant: str) -> None:
    trace_id = uuid4().hex
    written = line(
        "Füße 王 🙂 refused",
        tenant=tenant,
        level="warn",
        trace_id=trace_id,
        span_id="ab" * 8,
        data={"tenant": tenant, "error": "ValueError: no such model", "nested": {"a": [1, None]}},
    )
    await log(aggregator, written, line("something else", tenant=tenant))
    for params in ({"q": "refused"}, {"q": '"such model" füße'}, {"q": "王"}, {"trace_id": trace_id}):
        [item] = await found(aggregator, tenant, 1, **params)
        assert item == msgspec.to_builtins(written)
    assert len(await found(aggregator, tenant, 2, service="agent")) == 2
    async with aggregator.client("log_aggregator", tenant) as client:
        for params in ({"q": "refused -model"}, {"q": "such refused nothing"}, {"service": "billing"}):
            assert (await client.get("/api/v1/logs", params=params)).json()["items"] == []


async def test_lines_come_newest_first_in_pages_and_since_a_time(aggregator: Platform, tenant: str) -> None:
    now = utcnow()
    # Two lines in the same millisecond, and some in the indices of other days.
    times = [now - timedelta(days=2), now - timedelta(days=1), now - timedelta(seconds=5), now, now]
    await log(aggregator, *(line(f"n{n}", tenant=tenant, at=at) for n, at in enumerate(times)))
    await found(aggregator, tenant, 5)
    async with aggregator.client("log_aggregator", tenant) as client:
        seen: list[str] = []
        cursor: dict[str, str] = {}
        while True:
            answer = (await client.get("/api/v1/logs", params={"limit": "2", **cursor})).json()
            seen += [item["message"] for item in answer["items"]]
            if not answer["next"]:
                break
            cursor = {"cursor": answer["next"]}
    assert seen[2:] == ["n2", "n1", "n0"]
    assert set(seen[:2]) == {"n3", "n4"}
    since = (now - timedelta(hours=1)).isoformat()
    assert {item["message"] for item in await found(aggregator, tenant, 3, since=since)} == {"n2", "n3", "n4"}
    lines = await found(aggregator, tenant, 2, until=since)
    assert {item["message"] for item in lines} == {"n0", "n1"}
    # OpenSearch itself would refuse this offset.
    since = (now - timedelta(hours=1)).astimezone(timezone(timedelta(hours=23, minutes=59))).isoformat()
    assert {item["message"] for item in await found(aggregator, tenant, 3, since=since)} == {"n2", "n3", "n4"}


async def test_a_tenant_sees_its_own_lines_and_the_operator_all(aggregator: Platform, tenant: str) -> None:
    word = f"word{uuid4().hex}"
    inside = line(word, data={"for_tenant": tenant})
    await log(aggregator, inside, line(word, tenant=tenant), line(word, tenant="somebody else"), line(word))
    assert len(await found(aggregator, "", 4, q=word)) == 4
    assert len(await found(aggregator, "", 2, q=word, tenant_id=tenant)) == 2
    assert [item["data"] for item in await found(aggregator, tenant, 1, q=word)] == [{"tenant": tenant}]
    assert len(await found(aggregator, "", 1, q=word, tenant_id="somebody else")) == 1
    async with aggregator.client("log_aggregator", tenant) as client:
        answer = await client.get("/api/v1/logs", params={"tenant_id": "somebody else"})
    assert answer.status_code == 403


async def test_the_services_own_lines_arrive(aggregator: Platform) -> None:
    # Again, because another test may have wiped the index since the first time.
    aggregator.stop("log_aggregator")
    await aggregator.start("log_aggregator")
    items = await found(aggregator, "", 1, q='"service is up"', service="log_aggregator")
    assert items[0]["message"] == "service is up"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"trace_id": "xyz"}, "trace_id"),
        ({"since": "now"}, "since"),
        ({"since": "0001-01-01T00:00:00+01:00"}, "since"),
        ({"cursor": "eA=="}, "cursor"),
        ({"cursor": "WzFd"}, "cursor"),
        ({"cursor": "WyJ4IiwieCJd"}, "cursor"),
        # Deeper than a parser of JSON goes, and a time that OpenSearch does not read.
        ({"cursor": urlsafe_b64encode(b"[" * 3000).decode()}, "cursor"),
        ({"cursor": urlsafe_b64encode(b'["2026-W01-1", "x"]').decode()}, "cursor"),
        ({"limit": "0"}, "limit"),
        ({"q": "\x00"}, "q"),
    ],
)
async def test_an_invalid_query_is_refused(
    aggregator: Platform, tenant: str, params: dict[str, str], field: str
) -> None:
    async with aggregator.client("log_aggregator", tenant) as client:
        answer = await client.get("/api/v1/logs", params=params)
    assert answer.status_code == 422, answer.text
    assert [error["field"] for error in answer.json()["errors"]] == [field]


@pytest.mark.parametrize("q", ['"', "(", "a AND", "*", "~", "-", "\\", "/x/", "a:b", "[a TO b]", "🙂"])
async def test_no_search_text_is_an_error(aggregator: Platform, tenant: str, q: str) -> None:
    async with aggregator.client("log_aggregator", tenant) as client:
        assert (await client.get("/api/v1/logs", params={"q": q})).status_code == 200


async def test_events_are_indexed_without_the_text_of_people(
    aggregator: Platform, search: OpenSearch, tenant: str
) -> None:
    trace_id, run_id, channel_id = uuid4().hex, uuid4(), uuid4()
    received = MessageReceived(
        channel_id=channel_id,
        channel_type="telegram",
        agent_id=uuid4(),
        session_key="opaque",
        conversation_id="secret-conversation",
        subject_id="subject-1",
        vendor_message_id="secret-vendor-id",
        text="secret-text",
        received_at=utcnow(),
    )
    completed = RunCompleted(run_id=run_id, session_key="opaque", reply="secret-reply", said="secret-words", n=4)
    await event(aggregator, CHANNEL_EVENTS, received, tenant, trace_id)
    await event(aggregator, AGENT_EVENTS, completed, tenant, trace_id)
    query = {"query": {"term": {"trace_id": trace_id}}, "sort": ["type"]}

    async def both() -> list[dict[str, Any]] | None:
        index = f"{aggregator.prefix}clawbus-events-*"
        try:
            answer = search.search(index=index, body=query, params={"ignore_unavailable": "true"})
        except TransportError:
            # The index is new and has no shard yet.
            return None
        hits = [hit["_source"] for hit in answer["hits"]["hits"]]
        return hits if len(hits) == 2 else None

    hits = await aggregator.until(both)
    assert hits is not None
    agents, channels = hits
    assert (agents["type"], agents["tenant"], agents["service"]) == ("agent.v1.RunCompleted", tenant, "agent")
    said = {"run_id": str(run_id), "session_key": "opaque", "n": 4, "subject_id": "", "channel_id": None}
    assert agents["data"] == said
    assert channels["data"].keys() == {
        *("channel_id", "channel_type", "agent_id", "session_key", "subject_id", "received_at"),
    }
    assert "secret" not in str(hits)


async def test_the_same_message_twice_is_one_document(aggregator: Platform, search: OpenSearch, tenant: str) -> None:
    id_, one = uuid7(), line("repeated", tenant=tenant)
    for _ in range(3):
        await aggregator.produce(SERVICE_LOGS, one, key="agent", message_id=id_)
    await log(aggregator, line("after it", tenant=tenant))
    assert len(await found(aggregator, tenant, 1, q="after")) == 1
    assert len(await found(aggregator, tenant, 1, q="repeated")) == 1


async def test_while_opensearch_refuses_nothing_is_lost(aggregator: Platform, search: OpenSearch, tenant: str) -> None:
    """Blocks writes in the same way as OpenSearch does if the disk is full."""
    await log(aggregator, line("before", tenant=tenant))
    await found(aggregator, tenant, 1)
    letters = await dead_letters(aggregator)
    index = f"{aggregator.prefix}clawbus-logs-{utcnow():%Y.%m.%d}"
    search.indices.put_settings(index=index, body={"index.blocks.read_only_allow_delete": True})
    try:
        await log(aggregator, line("meanwhile", tenant=tenant))

        async def said_so() -> bool:
            return "could not process a batch" in aggregator.log("log_aggregator")

        await aggregator.until(said_so)
        assert await dead_letters(aggregator) == letters
    finally:
        search.indices.put_settings(index=index, body={"index.blocks.read_only_allow_delete": None})
    await found(aggregator, tenant, 1, q="meanwhile")


async def test_a_wiped_index_is_made_again_from_its_template(
    aggregator: Platform, search: OpenSearch, tenant: str
) -> None:
    await log(aggregator, line("before", tenant=tenant))
    await found(aggregator, tenant, 1)
    search.indices.delete_index_template(name=f"{aggregator.prefix}clawbus-logs")
    search.indices.delete(index=f"{aggregator.prefix}clawbus-logs-*")
    await log(aggregator, line("after", tenant=tenant, trace_id="ab" * 16))
    assert [item["message"] for item in await found(aggregator, tenant, 1, trace_id="ab" * 16)] == ["after"]
    mapping = search.indices.get_mapping(index=f"{aggregator.prefix}clawbus-logs-{utcnow():%Y.%m.%d}")
    [fields] = [index["mappings"] for index in mapping.values()]
    assert fields["dynamic"] == "false"


async def test_an_old_index_is_deleted_when_a_new_day_begins(aggregator: Platform, search: OpenSearch) -> None:
    name = f"{aggregator.prefix}clawbus-spans-"
    # The state before the first span of the day. Other tests may have sent spans.
    search.indices.delete(index=f"{name}*", params={"ignore_unavailable": "true"})
    for day in (utcnow() - timedelta(days=40), utcnow() - timedelta(days=3)):
        search.indices.create(index=f"{name}{day:%Y.%m.%d}")
    provider = TracerProvider(resource=Resource.create({"service.name": "test"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter(aggregator)))
    with provider.get_tracer("test").start_as_current_span("first of the day"):
        pass
    names = set(search.indices.get(index=f"{name}*"))
    assert names == {f"{name}{day:%Y.%m.%d}" for day in (utcnow() - timedelta(days=3), utcnow())}


async def test_a_record_that_is_not_a_log_line_is_the_only_dead_letter(aggregator: Platform, tenant: str) -> None:
    letters = await dead_letters(aggregator)
    good = Envelope(id=uuid7(), source="agent", type=LogLine.wire_name(), time=utcnow())
    await raw(aggregator, SERVICE_LOGS, b"{not json", good.headers())
    await raw(aggregator, SERVICE_LOGS, b"\xff\xfe" + tenant.encode(), {"ce_type": LogLine.wire_name()})
    await log(aggregator, line("behind it", tenant=tenant))
    await found(aggregator, tenant, 1, q="behind")

    async def two_more() -> set[tuple[Any, ...]] | None:
        more = await dead_letters(aggregator) - letters
        return more if len(more) == 2 else None

    stored = await aggregator.until(two_more)
    assert stored is not None
    assert (str(good.id), "failed") in stored


def exporter(aggregator: Platform) -> OTLPSpanExporter:
    """Returns the exporter of the OpenTelemetry SDK."""
    return OTLPSpanExporter(f"http://127.0.0.1:{aggregator.ports['otlp']}/v1/traces", timeout=10)


async def test_a_trace_is_shown_only_to_its_tenant_and_the_operator(aggregator: Platform, tenant: str) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "channel"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter(aggregator)))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("POST /webhooks", kind=SpanKind.SERVER, attributes={"a": 1, "b": [1, 2]}) as root:
        with tracer.start_as_current_span("call vendor", kind=SpanKind.CLIENT) as child:
            child.record_exception(ValueError("x"))
        context = root.get_span_context()
        trace_id = f"{context.trace_id:032x}"
    other = SpanContext(uuid4().int, 7, is_remote=True, trace_flags=TraceFlags(1))
    tracer.start_span("process batch", kind=SpanKind.CONSUMER, links=[Link(context), Link(other)]).end()
    await event(
        aggregator,
        AGENT_EVENTS,
        RunStarted(run_id=uuid4(), session_key="s", agent_id=uuid4(), attempt=1),
        tenant,
        trace_id,
    )

    async def shown(tenant_id: str) -> list[dict[str, Any]]:
        async with aggregator.client("log_aggregator", tenant_id) as client:
            answer = await client.get(f"/api/v1/traces/{trace_id}")
        assert answer.status_code == 200, answer.text
        items: list[dict[str, Any]] = answer.json()["items"]
        return items

    async def all_three() -> list[dict[str, Any]] | None:
        items = await shown(tenant)
        return items if len(items) == 3 else None

    spans = await aggregator.until(all_three)
    assert spans is not None
    server, client, batch = spans
    span_id = f"{context.span_id:016x}"
    assert (server["name"], server["kind"], server["parent_id"]) == ("POST /webhooks", "server", "")
    assert (server["service"], server["trace_id"], server["span_id"]) == ("channel", trace_id, span_id)
    assert server["attributes"]["a"] == 1
    assert server["start_ns"] <= client["start_ns"] <= client["end_ns"] <= server["end_ns"]
    assert (client["name"], client["parent_id"]) == ("call vendor", span_id)
    assert batch["trace_id"] != trace_id
    assert batch["links"] == [[trace_id, span_id]]
    assert len(await shown("")) == 3
    assert await shown(str(uuid4())) == []


async def test_a_body_without_spans_is_refused_and_a_compressed_one_accepted(aggregator: Platform) -> None:
    url = f"http://127.0.0.1:{aggregator.ports['otlp']}/v1/traces"
    protobuf = {"content-type": "application/x-protobuf"}
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.post(url, json={})).status_code == 415
        assert (await client.post(url, content=b"\xff\xff\xff", headers=protobuf)).status_code == 400
        bomb = gzip.compress(bytes(64 * 1024 * 1024))
        zipped = protobuf | {"content-encoding": "gzip"}
        assert (await client.post(url, content=bomb, headers=zipped)).status_code == 400
        assert (await client.post(url, content=b"no gzip", headers=zipped)).status_code == 400
        assert (await client.post(url, content=gzip.compress(b""), headers=zipped)).status_code == 200


async def test_a_span_that_opensearch_refuses_is_not_asked_for_again(aggregator: Platform) -> None:
    good, bad = uuid4(), uuid4()
    spans = [
        Span(trace_id=good.bytes, span_id=b"1" * 8, name="good", start_time_unix_nano=time.time_ns()),
        # The index cannot hold a number beyond signed 64 bits.
        Span(trace_id=bad.bytes, span_id=b"1" * 8, name="bad", start_time_unix_nano=2**64 - 1),
    ]
    request = ExportTraceServiceRequest(resource_spans=[ResourceSpans(scope_spans=[ScopeSpans(spans=spans)])])
    async with httpx.AsyncClient(trust_env=False) as client:
        url = f"http://127.0.0.1:{aggregator.ports['otlp']}/v1/traces"
        headers = {"content-type": "application/x-protobuf"}
        answer = await client.post(url, content=request.SerializeToString(), headers=headers)
    assert answer.status_code == 400

    async def shown() -> bool:
        async with aggregator.client("log_aggregator") as client:
            return bool((await client.get(f"/api/v1/traces/{good.hex}")).json()["items"])

    await aggregator.until(shown)
