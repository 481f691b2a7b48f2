"""Kafka's client side: the relay's publisher, the broker's ids of topics, and headers as strings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar
from uuid import UUID

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, UnknownTopicOrPartitionError
from aiokafka.partitioner import murmur2
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import (
    AbstractType,
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)

from infra.bus.outbox import HeldBack, Outcome, Pending, Unpublishable, by_destination
from infra.connections import kafka_options
from infra.errors import describe
from infra.postgres.tx import MAX_MESSAGE_BYTES

# One record. Larger content belongs in the object store, with a reference in the message.
MAX_RECORD_BYTES = MAX_MESSAGE_BYTES
# Topics take records with so much beside the body, and some room for names and lengths.
MAX_HEADER_BYTES = 48 * 1024


class KafkaPublisher:
    """Publishes outbox rows by one idempotent producer, which loses, repeats and reorders nothing within a partition.

    There is no time-out after which a message is sent again: the producer's own retry keeps the order, a second send
    does not.
    """

    bus = "kafka"

    def __init__(self, bootstrap: str, *, prefix: str = "", client_id: str = "clawbus") -> None:
        self._bootstrap = bootstrap
        self._prefix = prefix
        self._client_id = client_id
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> AIOKafkaProducer:
        """Connects if it is not connected yet. Raises KafkaConnectionError while no broker answers."""
        # The relay and a health check may call at the same time. A second producer would never be stopped.
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **kafka_options(self._bootstrap),
                    client_id=self._client_id,
                    enable_idempotence=True,
                    acks="all",
                    max_batch_size=128 * 1024,
                    compression_type="lz4",
                )
                try:
                    await producer.start()
                except BaseException:
                    await producer.stop()
                    raise
                self._producer = producer
        return self._producer

    async def stop(self) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]:
        producer = await self.start()
        outcomes: list[Outcome] = [None] * len(rows)
        batches: list[_Batch] = []
        for destination, indexes in by_destination(rows).items():
            topic = self._prefix + destination
            try:
                # A send to a topic that does not exist would hold back all others until its time-out.
                partitions = sorted(await asyncio.wait_for(producer.partitions_for(topic), 1))
            except (TimeoutError, UnknownTopicOrPartitionError) as error:
                for index in indexes:
                    outcomes[index] = HeldBack(f"topic {topic}: {type(error).__name__}; is the topic provisioned?")
                continue
            filling: dict[int, _Batch] = {}
            for index in indexes:
                row = rows[index]
                headers = [(name, value.encode()) for name, value in row.headers.items()]
                if unpublishable := _too_large(row, headers):
                    outcomes[index] = unpublishable
                    continue
                partition = partitions[_hash(row.key) % len(partitions)]
                batch = filling.get(partition)
                if batch is None or not batch.add(index, row, headers):
                    batch = filling[partition] = _Batch(producer, topic, partition)
                    batches.append(batch)
                    batch.add(index, row, headers)
        # In the order in which they were begun, so that those of one partition follow each other.
        sent = [await batch.send() for batch in batches]
        results = await asyncio.gather(*sent, return_exceptions=True)
        failed: dict[tuple[str, int], HeldBack] = {}
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, BaseException):
                if not isinstance(result, KafkaError):
                    raise result
                failed.setdefault(batch.place, HeldBack(describe(result)))
            # All messages of the partition behind a failure count as not sent. They are sent again in their order.
            if held_back := failed.get(batch.place):
                for index in batch.indexes:
                    outcomes[index] = held_back
        return outcomes


class _Batch:
    """Records of one partition that are sent together: a future for each record would cost more than the record."""

    def __init__(self, producer: AIOKafkaProducer, topic: str, partition: int) -> None:
        self.place = topic, partition
        self.indexes: list[int] = []
        self._producer = producer
        self._records = producer.create_batch()

    def add(self, index: int, row: Pending, headers: Sequence[tuple[str, bytes]]) -> bool:
        """False if the batch is full. The first record always fits."""
        if self._records.append(timestamp=None, key=row.key.encode(), value=row.body, headers=headers) is None:
            return False
        self.indexes.append(index)
        return True

    async def send(self) -> asyncio.Future[Any]:
        """Waits until the batch before it has left for the broker. The result is done when the broker has this one."""
        self._records.close()  # otherwise it would wait for more records
        topic, partition = self.place
        sent: asyncio.Future[Any] = await self._producer.send_batch(self._records, topic, partition=partition)
        return sent


def _too_large(row: Pending, headers: Sequence[tuple[str, bytes]]) -> Unpublishable | None:
    if len(row.body) > MAX_RECORD_BYTES:
        return Unpublishable(f"body: must have at most {MAX_RECORD_BYTES} bytes, not {len(row.body)}")
    if (size := len(row.key.encode()) + sum([len(value) for _, value in headers])) > MAX_HEADER_BYTES:
        return Unpublishable(f"key and headers: must have at most {MAX_HEADER_BYTES} bytes, not {size}")
    return None


@lru_cache(maxsize=4096)
def _hash(key: str) -> int:
    """Kafka's own hash of a record's key, from which all of its clients find the partition."""
    return int(murmur2(key.encode())) & 0x7FFF_FFFF


class _Uuid(AbstractType[UUID]):  # type: ignore[misc]  # aiokafka is untyped
    @classmethod
    def encode(cls, value: UUID) -> bytes:
        return value.bytes

    @classmethod
    def decode(cls, data: Any) -> UUID:
        return UUID(bytes=data.read(16))

    @classmethod
    def repr(cls, value: UUID) -> str:
        return str(value)


class _MetadataResponse(Response):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 3
    API_VERSION = 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("name", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("authorized_operations", Int32),
        ("tags", TaggedFields),
    )


class _MetadataRequestV10(RequestStruct):  # type: ignore[misc]  # aiokafka is untyped
    """Metadata version 10, the first with topic ids. aiokafka itself uses version 5."""

    API_KEY = 3
    API_VERSION = 10
    FLEXIBLE_VERSION: ClassVar[bool] = True
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("name", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class _MetadataRequest(Request[_MetadataRequestV10]):  # type: ignore[misc]  # aiokafka is untyped
    API_KEY = 3

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = topics

    def build(self, request_struct_class: type[_MetadataRequestV10]) -> _MetadataRequestV10:
        return request_struct_class([(UUID(int=0), topic, {}) for topic in self._topics], False, False, False, {})


async def topic_ids(client: Any, topics: Sequence[str]) -> dict[str, UUID]:
    """The broker's ids of those `topics` that exist. A topic that was deleted and created again has another id.

    `client` is the AIOKafkaClient of a started consumer. Raises KafkaError while no broker answers.
    """
    response = await client.send(client.get_random_node(), _MetadataRequest(topics))
    return {name: topic_id for code, name, topic_id, *_ in response.topics if code == 0}


def printable_headers(headers: Sequence[tuple[str, bytes | None]]) -> tuple[dict[str, str], str | None]:
    """A record's headers as strings, and the name of the first that is not UTF-8 (its bytes are escaped)."""
    try:
        return {name: value.decode() if value else "" for name, value in headers}, None
    except UnicodeDecodeError as error:
        bad = next(name for name, value in headers if value == error.object)
        return {name: (value or b"").decode(errors="backslashreplace") for name, value in headers}, bad


def headers_json(headers: dict[str, str]) -> str:
    # ensure_ascii turns NUL into an escape that PostgreSQL can store.
    return json.dumps(headers)
