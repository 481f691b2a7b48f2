"""The tail of a Kafka topic, for content that is shown live. Every process reads all partitions from their ends on.

There is no consumer group, no offset and no repetition. A reader that must not miss a record reads it elsewhere. It is
told each time that the tail begins: at the start, and after each interruption.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from uuid import UUID

from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.bus.dispatch import decode
from infra.bus.kafka import printable_headers, topic_ids
from infra.bus.kafka_loop import METADATA_MS, KafkaLoop
from infra.errors import InvalidMessage
from protos.topology import Subscription, Topic

# How often the tail checks whether the topic has more partitions, or was deleted and created again.
CHECK_SECONDS = METADATA_MS / 1000
MAX_RECORDS = 500


class Tail(KafkaLoop):
    """Hands each new record of the subscription's topic to its handler, until stopped.

    A record that cannot be read, and one whose handler fails, is logged and skipped: nothing depends on a tail.
    """

    def __init__(self, subscription: Subscription, *, bootstrap: str, prefix: str = "") -> None:
        assert isinstance(subscription.source, Topic)
        assert subscription.tail
        self._subscription = subscription
        self._begins: Callable[[], Awaitable[None]] = subscription.tail
        self._topic = subscription.source
        self._name = prefix + subscription.source.name
        client_id = f"clawbus-{subscription.group}-tail"
        super().__init__("infra.bus.tail", bootstrap=bootstrap, client_id=client_id, topic=self._name)

    def _new_consumer(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(**self._settings, auto_offset_reset="latest")

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        log: tuple[UUID, set[int]] | None = None
        checked = -CHECK_SECONDS
        while not self.stopping.is_set():
            if time.monotonic() - checked > CHECK_SECONDS:
                checked = time.monotonic()
                if (found := await self._find_log(consumer)) != log:
                    log = found
                    await self._begin(consumer, log[1] if log else set())
            for records in (await self.fetch(consumer, MAX_RECORDS)).values():
                for record in records:
                    await self._handle(record.headers, record.value)

    async def _find_log(self, consumer: AIOKafkaConsumer) -> tuple[UUID, set[int]] | None:
        """The topic's id at the broker and its partitions. None if the topic does not exist."""
        found = await topic_ids(consumer._client, [self._name])
        if self._name not in found:
            self._log.warning("topic does not exist yet; will check again")
            return None
        # Asked for by name: a consumer without an assignment knows no topics.
        await consumer._client.add_topic(self._name)
        return found[self._name], set(consumer.partitions_for_topic(self._name) or ())

    async def _begin(self, consumer: AIOKafkaConsumer, numbers: set[int]) -> None:
        partitions = [TopicPartition(self._name, number) for number in numbers]
        consumer.assign(partitions)
        if partitions:
            await consumer.seek_to_end(*partitions)
        # The position is looked up now, not at the first fetch: every record from here on is read.
        for tp in partitions:
            await consumer.position(tp)
        await self._begins()

    async def _handle(self, raw: list[tuple[str, bytes | None]], body: bytes | None) -> None:
        headers, _ = printable_headers(raw)
        try:
            message = decode(headers, body, self._topic.messages).message
        except InvalidMessage as error:
            self._log.debug("record skipped: it cannot be read", error=str(error))
            return
        try:
            await self._subscription.handler(message, headers)
        except Exception:
            self._log.error("record skipped: its handler failed", exc_info=True)
