"""The sample's own topic and queue."""

from __future__ import annotations

from datetime import timedelta

from protos.messages.sample import NoteTaken, TakeNote
from protos.topology import Catalog, Exchange, Queue, Topic

SAMPLE_EVENTS = Topic(
    name="sample.events",
    partitions=4,
    retention=timedelta(days=7),
    key="notebook",
    messages=(NoteTaken,),
    producers=("sample_desk",),
    consumers=("sample_ledger",),
)

SAMPLE_WORK = Queue(
    name="sample.work",
    exchange=Exchange("sample", "direct"),
    routing_key="sample.work",
    message=TakeNote,
    producers=("sample_front",),
    consumer="sample_desk",
    retries=(timedelta(milliseconds=200), timedelta(seconds=1)),
)

SAMPLE = Catalog(topics=(SAMPLE_EVENTS,), queues=(SAMPLE_WORK,))
