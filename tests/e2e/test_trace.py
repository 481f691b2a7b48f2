"""A note is one trace over HTTP, RabbitMQ, Kafka and gRPC; batches have traces of their own and link to it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import httpx
import pytest
from rich.console import Console

from infra.postgres.schema import Passwords
from tooling.testing.otlp import OtlpReceiver, ReceivedSpan, render_trace
from tooling.testing.sample.run import SERVICES, Engines, SampleServices
from tooling.testing.stack import Stack

SEEN = "clawbus.sample.v1.Sample/Seen"
PROCESS_WORK, PROCESS_EVENTS = "process sample:sample.work", "process sample.events"
# The shape of the one trace: service, kind, name.
STORY = (
    ("sample_front", "server", "POST /notes"),
    ("sample_desk", "consumer", PROCESS_WORK),
    ("sample_ledger", "internal", "tell front"),
    ("sample_ledger", "client", SEEN),
    ("sample_front", "server", SEEN),
)


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
async def front(
    stack: Stack,
    database: str,
    vhost: str,
    topic_prefix: str,
    receiver: OtlpReceiver,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[httpx.AsyncClient]:
    engines = Engines(database, stack.kafka_bootstrap_servers, vhost, stack.rabbitmq_management_url, stack.redis_url)
    services = SampleServices(
        engines,
        tmp_path_factory.mktemp("services"),
        Passwords("owner-pw", "request-pw", "worker-pw"),
        prefix=topic_prefix,
        otlp=receiver.endpoint,
    )
    await services.prepare()
    try:
        for name in SERVICES:
            services.start(name)
        for name in SERVICES:
            await services.ready(name)
        async with httpx.AsyncClient(base_url=services.base_url("front"), timeout=30) as client:
            yield client
    finally:
        await asyncio.to_thread(services.stop)  # not in this loop: the receiver takes the last spans in it


@contextmanager
def shown(receiver: OtlpReceiver) -> Iterator[None]:
    """Prints every trace as a tree if the block fails."""
    try:
        yield
    except (AssertionError, TimeoutError):
        for trace_id in dict.fromkeys(span.trace_id for span in receiver.spans):
            Console(width=80).print(trace_id, render_trace(receiver.spans, trace_id), "")
        raise


def links_to(span: ReceivedSpan, spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
    return [other for other in spans if (span.trace_id, span.span_id) in other.links]


async def test_a_note_is_one_trace_from_the_request_to_the_last_call(
    front: httpx.AsyncClient, receiver: OtlpReceiver
) -> None:
    response = await front.post("/notes", json={"notebook": "traced", "text": "x"})
    assert response.status_code == 202
    message_id = response.json()["id"]

    def story_of(spans: Sequence[ReceivedSpan]) -> dict[tuple[str, str, str], ReceivedSpan]:
        first = next((s for s in spans if s.attributes.get("messaging.message.id") == message_id), None)
        return {(s.service, s.kind, s.name): s for s in spans if first and s.trace_id == first.trace_id}

    def complete(spans: Sequence[ReceivedSpan]) -> bool:
        story = story_of(spans)
        return len(story) >= len(STORY) and all(len(links_to(story[shape], spans)) == 2 for shape in STORY[:2])

    with shown(receiver):
        await receiver.wait_for(complete, seconds=60)
        by_shape = story_of(receiver.spans)
        story = receiver.trace(by_shape[STORY[0]].trace_id)
        assert Counter((s.service, s.kind, s.name) for s in story) == Counter(STORY)
        request, process_work, tell, call, answer = (by_shape[shape] for shape in STORY)

        assert request.parent_id == ""
        for child, parent in ((process_work, request), (tell, process_work), (call, tell), (answer, call)):
            assert child.parent_id == parent.span_id, f"{child.name} is not below {parent.name}"
        assert process_work.links == ((request.trace_id, request.span_id),)

        # A span that handles or sends many messages has a trace of its own, and links to the producer of each.
        [send_work] = [s for s in links_to(request, receiver.spans) if s is not process_work]
        [send_event] = [s for s in links_to(process_work, receiver.spans) if s.kind == "client"]
        [batch] = [s for s in links_to(process_work, receiver.spans) if s.kind == "consumer"]
        assert (send_work.service, send_work.kind, send_work.name) == ("sample_front", "client", "send")
        assert (send_event.service, send_event.name) == ("sample_desk", "send")
        assert (batch.service, batch.name) == ("sample_ledger", PROCESS_EVENTS)
        assert tell.links == ((batch.trace_id, batch.span_id),)
        for span in (send_work, send_event, batch):
            assert span.parent_id == ""
        assert len({request.trace_id, send_work.trace_id, send_event.trace_id, batch.trace_id}) == 4


async def test_every_message_of_a_batch_is_linked_once(front: httpx.AsyncClient, receiver: OtlpReceiver) -> None:
    notes = [{"notebook": "many", "text": f"note {n}"} for n in range(20)]
    responses = await asyncio.gather(*(front.post("/notes", json=note) for note in notes))
    ids = {response.json()["id"] for response in responses}

    def handled(spans: Sequence[ReceivedSpan]) -> list[ReceivedSpan]:
        return [s for s in spans if s.name == PROCESS_WORK and s.attributes["messaging.message.id"] in ids]

    with shown(receiver):
        await receiver.wait_for(
            lambda spans: len(handled(spans)) == 20 and all(len(links_to(s, spans)) == 2 for s in handled(spans)),
            seconds=60,
        )
        assert len({s.trace_id for s in handled(receiver.spans)}) == 20
        for work in handled(receiver.spans):
            around = links_to(work, receiver.spans)
            assert sorted(s.name for s in around) == [PROCESS_EVENTS, "send"]
            assert all(s.attributes["messaging.batch.message_count"] == len(s.links) for s in around)
