"""Compares the search index with the topics from which it is made, and stores the documents that are missing or differ.

A document has its message's id and follows from its message alone, so storing it again changes nothing else: the index
needs no shadow. It is compared as far as its reader has come and the topic reaches back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from sqlalchemy.ext.asyncio import AsyncEngine

from infra.bus.dispatch import Decoded, decode
from infra.bus.kafka import printable_headers, topic_ids
from infra.connections import kafka_options
from infra.errors import InvalidMessage
from infra.postgres.db import sql
from infra.postgres.read_models import Comparison, RowDifference
from infra.service import verification
from infra.service.verification import Progress, VerificationResult
from protos.catalog import AGENT_EVENTS, AUDIT_LOGS, CHANNEL_EVENTS, SERVICE_LOGS, USAGE_RECORDS
from protos.topology import Topic
from services.log_aggregator.index import documents
from services.log_aggregator.index.documents import IndexedDocument
from services.log_aggregator.index.mappings import SEARCHED_ONLY, Kind
from services.log_aggregator.index.search_index import CONSUMER_GROUP, SearchIndex

BATCH = 500


class Indexed(NamedTuple):
    """A topic in the index, by the name of its handler."""

    name: str
    topic: Topic
    kind: Kind
    make: Callable[[Decoded], IndexedDocument]


INDEXED = (
    Indexed("index_lines", SERVICE_LOGS, "logs", documents.line),
    Indexed("index_agent_events", AGENT_EVENTS, "events", documents.event),
    Indexed("index_channel_events", CHANNEL_EVENTS, "events", documents.event),
    Indexed("index_usage", USAGE_RECORDS, "events", documents.usage),
    Indexed("index_acts", AUDIT_LOGS, "audit", documents.act),
)


class _Cursor(msgspec.Struct):
    """How far a verification has come."""

    topic: str = ""
    """Kafka's id of the topic: another topic of the same name has other records at these offsets."""
    next: dict[int, int] = {}
    """Partition → the offset of its next record."""


class _Log:
    """The records of a topic that the index's reader has taken."""

    def __init__(self, consumer: AIOKafkaConsumer, topic: str, ends: dict[int, int], next_: dict[int, int]) -> None:
        self._consumer = consumer
        self._topic = topic
        self._ends = ends
        self.next = next_

    @property
    def left(self) -> int:
        return sum(max(0, end - self.next.get(n, 0)) for n, end in self._ends.items())

    async def start(self) -> None:
        partitions = [TopicPartition(self._topic, n) for n in self._ends]
        self._consumer.assign(partitions)
        for tp, begin in (await self._consumer.beginning_offsets(partitions)).items():
            self.next[tp.partition] = max(begin, self.next.get(tp.partition, 0))

    async def read(self) -> Sequence[Any]:
        """Some records, none after the last one."""
        for n, end in self._ends.items():
            tp = TopicPartition(self._topic, n)
            self._consumer.pause(*(other for other in self._consumer.assignment() if other != tp))
            self._consumer.resume(tp)
            self._consumer.seek(tp, self.next[n])
            while self.next[n] < end:
                found = (await self._consumer.getmany(tp, timeout_ms=1000, max_records=BATCH)).get(tp, [])
                # After the last record there may be only control records; the position shows that they were read.
                self.next[n] = min(found[-1].offset + 1 if found else await self._consumer.position(tp), end)
                if records := [record for record in found if record.offset < end]:
                    return records
        return []


async def verify(
    engine: AsyncEngine,
    index: SearchIndex,
    indexed: Indexed,
    *,
    bootstrap: str,
    prefix: str = "",
    switch: bool = False,
    restart: bool = False,
    progress: Progress = lambda done, total: None,
) -> VerificationResult:
    """Compares the documents of one topic. switch: stores those that are missing or differ."""
    async with verification.one_at_a_time(engine, "log_aggregator"):
        async with engine.begin() as connection:
            state = None if restart else await verification.paused(connection, indexed.name, switch=switch)
            letters = await sql(
                connection,
                "SELECT message_id FROM dead_letter WHERE consumer = $1 AND destination = $2 AND state <> 'redriven'",
                CONSUMER_GROUP,
                indexed.topic.name,
            )
        not_indexed = {message_id for (message_id,) in letters}
        topic = prefix + indexed.topic.name
        # Records that are deleted meanwhile are left out, and not all up to the end.
        consumer = AIOKafkaConsumer(**kafka_options(bootstrap), enable_auto_commit=False, auto_offset_reset="earliest")
        await consumer.start()
        try:
            id_ = str((await topic_ids(consumer._client, [topic])).get(topic))
            cursor = msgspec.json.decode(state.cursor or b"{}", type=_Cursor) if state else _Cursor()
            if state is None or cursor.topic != id_:
                state, cursor = VerificationResult(indexed.name), _Cursor(id_)
            log = _Log(consumer, topic, await _taken(bootstrap, prefix + CONSUMER_GROUP, topic), cursor.next)
            await log.start()
            while not state.finished:
                records = await log.read()
                made = [one for one in _documents(indexed, records) if one.id not in not_indexed]
                found, wrong = await _compare(index, indexed.kind, [d for d in made if index.keeps(indexed.kind, d)])
                if switch:
                    await index.store(indexed.kind, wrong)
                state.add([""] * len(records), found, left=0 if switch else len(wrong))
                state.cursor = msgspec.json.encode(cursor).decode()
                state.finished = not records
                async with engine.begin() as connection:
                    await verification.save(connection, state)
                progress(state.scopes, state.scopes + log.left)
        finally:
            await consumer.stop()
    return state


async def _taken(bootstrap: str, group: str, topic: str) -> dict[int, int]:
    """How far the index's reader has come, by partition."""
    admin = AIOKafkaAdminClient(**kafka_options(bootstrap))
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(group)
    finally:
        await admin.close()
    return {tp.partition: found.offset for tp, found in sorted(offsets.items()) if tp.topic == topic}


def _documents(indexed: Indexed, records: Sequence[Any]) -> list[IndexedDocument]:
    made = []
    for record in records:
        headers, bad = printable_headers(record.headers)
        try:
            if bad is None:
                made.append(indexed.make(decode(headers, record.value, indexed.topic.messages)))
        except InvalidMessage:
            continue  # The reader has made it a dead letter.
    return made


async def _compare(
    index: SearchIndex, kind: Kind, made: Sequence[IndexedDocument]
) -> tuple[Comparison, list[IndexedDocument]]:
    """Also returns the documents that are missing or differ."""
    by_id = {document.id: document for document in made}
    stored = await index.read(kind, list(by_id.values())) if by_id else {}
    expected = {id_: _stored_form(document) for id_, document in by_id.items()}
    differences = [
        RowDifference(id_, "missing" if id_ not in stored else _differing(stored[id_], body))
        for id_, body in sorted(expected.items())
        if stored.get(id_) != body
    ]
    comparison = Comparison(
        len(stored), sum(map(_hash, stored.values())), len(expected), sum(map(_hash, expected.values())), differences
    )
    return comparison, [by_id[one.key] for one in differences]


def _stored_form(document: IndexedDocument) -> dict[str, Any]:
    body = {name: value for name, value in document.body.items() if name not in SEARCHED_ONLY}
    form: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(body))
    return form


def _differing(stored: dict[str, Any], body: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name in stored.keys() | body.keys() if stored.get(name) != body.get(name)))


def _hash(body: dict[str, Any]) -> int:
    form = msgspec.json.encode(body, order="deterministic")
    return int.from_bytes(hashlib.blake2b(form, digest_size=8).digest(), signed=True)
