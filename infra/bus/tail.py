"""The tail of a Kafka topic, for what is shown live: every process reads all partitions, from their ends on.

There is no group, no offset and no repetition. Whoever must not miss anything reads it elsewhere, and is told each
time that the tail begins anew: at the start, and after whatever broke it off.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from infra.bus.dispatch import decode
from infra.bus.kafka import printable_headers, topic_incarnations
from infra.bus.reader import _stop
from infra.errors import InvalidMessage, describe
from infra.observe.logs import get_logger
from protos.topology import Subscription, Topic

BACKOFF_SECONDS = (0.1, 0.5, 2.0)
# How often it is looked whether the topic has more partitions, or was made anew and the offsets are of the former.
LOOK_SECONDS = 5.0
MAX_RECORDS = 500


class Tail:
    """Hands each new record of the subscription's topic to its handler, until stopped.

    One that cannot be read, and one whose handler fails, is logged and left: nothing depends on a tail.
    """

    def __init__(self, subscription: Subscription, *, bootstrap: str, prefix: str = "") -> None:
        assert isinstance(subscription.source, Topic)
        assert subscription.tail
        self._subscription = subscription
        self._begins: Callable[[], Awaitable[None]] = subscription.tail
        self._topic = subscription.source
        self._name = prefix + subscription.source.name
        self._bootstrap = bootstrap
        self._stopping = asyncio.Event()
        self._log = get_logger("infra.bus.tail")

    async def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                await self._read()
                failures = 0
            except (KafkaError, OSError) as error:
                failures += 1
                self._log.warning(
                    "topic cannot be read, trying again",
                    topic=self._name,
                    error=describe(error),
                    failures=failures,
                )
                await self._pause(BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    async def stop(self) -> None:
        self._stopping.set()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return

    async def _read(self) -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=f"clawbus-{self._subscription.group}-tail",
            enable_auto_commit=False,
            auto_offset_reset="latest",
            fetch_max_wait_ms=50,
            metadata_max_age_ms=int(LOOK_SECONDS * 1000),
        )
        try:
            await consumer.start()
            log: tuple[UUID, set[int]] | None = None
            looked = -LOOK_SECONDS
            while not self._stopping.is_set():
                if time.monotonic() - looked > LOOK_SECONDS:
                    looked = time.monotonic()
                    if (found := await self._look(consumer)) != log:
                        log = found
                        await self._begin(consumer, log[1] if log else set())
                for records in (await consumer.getmany(timeout_ms=200, max_records=MAX_RECORDS)).values():
                    for record in records:
                        await self._handle(record.headers, record.value)
        finally:
            await _stop(consumer)

    async def _look(self, consumer: AIOKafkaConsumer) -> tuple[UUID, set[int]] | None:
        """The topic's id at the broker and its partitions; None: it is not there."""
        incarnations = await topic_incarnations(consumer._client, [self._name])
        if self._name not in incarnations:
            self._log.warning("topic is not there yet", topic=self._name)
            return None
        # Asked for by name: a consumer with nothing assigned knows of no topic by itself.
        await consumer._client.add_topic(self._name)
        return incarnations[self._name], set(consumer.partitions_for_topic(self._name) or ())

    async def _begin(self, consumer: AIOKafkaConsumer, numbers: set[int]) -> None:
        partitions = [TopicPartition(self._name, number) for number in numbers]
        consumer.assign(partitions)
        if partitions:
            await consumer.seek_to_end(*partitions)
        # Fixed now, and not at the first fetch: what comes from here on is heard.
        for tp in partitions:
            await consumer.position(tp)
        await self._begins()

    async def _handle(self, raw: list[tuple[str, bytes | None]], body: bytes | None) -> None:
        headers, _ = printable_headers(raw)
        try:
            message = decode(headers, body, self._topic.messages).message
        except InvalidMessage as error:
            self._log.debug("record passed over", topic=self._name, error=str(error))
            return
        try:
            await self._subscription.handler(message, headers)
        except Exception:
            self._log.error("record not handled", topic=self._name, exc_info=True)
