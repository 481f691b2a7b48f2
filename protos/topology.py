"""The types of the catalog: topics, exchanges, queues, and subscriptions to them.

Declarations only. A decorator such as ``@USAGE_RECORDS.batch(group="billing")`` returns a `Subscription`, a plain
record; the service passes it to ``service.consume``. So the list of subscriptions is data: ``./claw map`` and the
catalog test read the same list that the process runs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from protos.envelope import Message

Handler = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Subscription:
    """A consumer group's handler for the messages of `source`."""

    source: Topic | Queue
    group: str
    handler: Handler
    message: type[Message] | None = None
    """The one type that is handled; None if the handler takes all types of the source."""
    batch: bool = False
    """True: the handler gets ``list[message]``, one partition's batch in one transaction. False: one message."""
    prefetch: int = 0
    projection: tuple[str, ...] | None = None
    """The tables that a replay may rebuild with this handler; None if a replay must not run it."""
    tail: Handler | None = None
    """Set if every process gets each new record, see `Topic.tail`."""
    at_least_once: bool = False
    """The effect is not in PostgreSQL, see `Topic.at_least_once`."""
    hint: bool = False
    """The handler changes nothing in the database, see `Topic.each`."""

    def takes(self, message: Message) -> bool:
        """Whether the handler gets messages of this type."""
        return self.batch or self.message is None or type(message) is self.message

    @property
    def name(self) -> str:
        """``<group>.<handler>``, shown to people."""
        handler = self.handler.func if isinstance(self.handler, partial) else self.handler
        return f"{self.group}.{handler.__name__}"


@dataclass(frozen=True)
class Topic:
    """A Kafka topic: facts, ordered per key, retained, replayable."""

    name: str
    partitions: int
    retention: timedelta
    key: str
    messages: tuple[type[Message], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    ordered: bool = True
    """True: a failed record parks its key, and later records of the key wait behind it. False: a failed record becomes
    a dead letter and no other record waits."""

    def batch(self, *, group: str, projection: tuple[str, ...] | None = None) -> Callable[[Handler], Subscription]:
        """The handler takes ``(records: list[M], tx: Tx)``: a partition's batch, one transaction."""
        return lambda handler: Subscription(self, group, handler, batch=True, projection=projection)

    def each(self, message: type[Message], *, group: str, hint: bool = False) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, tx)``; it does not get records of other types on the topic.

        hint: the handler changes nothing in the database, and may get a message again: the message needs no inbox.
        """
        return lambda handler: Subscription(self, group, handler, message=message, hint=hint)

    def at_least_once(self, *, group: str) -> Callable[[Handler], Subscription]:
        """An at-least-once subscription, for an effect that is not in PostgreSQL.

        The handler takes ``(records)``, a list of messages with id and headers, outside any transaction. A record that
        it refuses with InvalidMessage becomes a dead letter; the others go on.
        """
        return lambda handler: Subscription(self, group, handler, batch=True, at_least_once=True)

    def tail(self, *, group: str, begins: Handler) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, headers)``: each new record once, in every process of `group`, outside any
        transaction.

        `begins` takes no message; it is called each time when earlier records may have been missed. Both also get the
        adapters.
        """
        return lambda handler: Subscription(self, group, handler, tail=begins)


@dataclass(frozen=True)
class Exchange:
    """A RabbitMQ exchange."""

    name: str
    kind: str
    """topic, direct or fanout."""


@dataclass(frozen=True)
class Queue:
    """A RabbitMQ quorum queue: work for one service, retried with growing delays, then a dead letter.

    A family such as ``channel.inbound.{type}`` has one Queue per type.
    """

    name: str
    exchange: Exchange
    routing_key: str
    message: type[Message]
    producers: tuple[str, ...]
    consumer: str
    retries: tuple[timedelta, ...]
    """The delay before each further attempt; there is one retry queue per distinct delay."""
    expires: timedelta | None = None
    """An older message becomes a dead letter and is not handled."""
    max_length: int = 1_000_000

    @property
    def dead_letter_queue(self) -> str:
        return f"{self.name}.dlq"

    def retry_queue(self, delay: timedelta) -> str:
        return f"{self.name}.retry.{int(delay.total_seconds() * 1000)}ms"

    def worker(self, *, prefetch: int) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, tx)`` and must be quick: it stores the work; the ack follows the commit."""
        return lambda handler: Subscription(self, self.consumer, handler, message=self.message, prefetch=prefetch)

    def batch_worker(self, *, most: int) -> Callable[[Handler], Subscription]:
        """The handler takes ``(messages: list[M], tx)``: up to `most` waiting messages in one transaction.

        If a group fails, each of its messages is handled alone, so that one bad message fails alone.
        """
        return lambda handler: Subscription(
            self, self.consumer, handler, message=self.message, batch=True, prefetch=2 * most
        )


@dataclass(frozen=True)
class Catalog:
    """Every topic and queue of a system."""

    topics: tuple[Topic, ...]
    queues: tuple[Queue, ...]

    def topic(self, name: str) -> Topic:
        """Raises KeyError for a name that is not in the catalog."""
        return {topic.name: topic for topic in self.topics}[name]

    def queue(self, name: str) -> Queue:
        """Raises KeyError for a name that is not in the catalog."""
        return {queue.name: queue for queue in self.queues}[name]
