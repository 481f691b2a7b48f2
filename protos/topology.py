"""The words in which the catalog is written: topics, exchanges, queues, and who subscribes to them.

Declarations only. A decorator such as ``@USAGE_RECORDS.batch(group="billing")`` yields a `Subscription`, a plain
record; the service passes it to ``service.consume``. So the list of who reads what is data, and
``./claw map`` and the catalog test read the same list that the process runs.
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
    """Somebody reads `source`. `message` is the one type handled; None: the handler takes all of the source's types.

    `batch`: the handler gets ``list[message]`` (one partition's batch, one transaction), else one message.
    `projection`: the tables that a replay may rebuild by this handler; None: replay must not run it.
    `outside`: the effect is not in PostgreSQL, see `Topic.outside`.
    `tail`: set where every process hears what comes from now on, see `Topic.tail`.
    """

    source: Topic | Queue
    group: str
    handler: Handler
    message: type[Message] | None = None
    batch: bool = False
    prefetch: int = 0
    projection: tuple[str, ...] | None = None
    tail: Handler | None = None
    outside: bool = False

    @property
    def name(self) -> str:
        """``<group>.<handler>``, for people."""
        handler = self.handler.func if isinstance(self.handler, partial) else self.handler
        return f"{self.group}.{handler.__name__}"


@dataclass(frozen=True)
class Topic:
    """A Kafka topic: facts, ordered per key, retained, replayable.

    `ordered`: a failed record parks its key and later records of the key queue behind it; otherwise the record
    is set aside alone.
    """

    name: str
    partitions: int
    retention: timedelta
    key: str
    messages: tuple[type[Message], ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    ordered: bool = True

    def batch(self, *, group: str, projection: tuple[str, ...] | None = None) -> Callable[[Handler], Subscription]:
        """The handler takes ``(records: list[M], tx: Tx)``: a partition's batch, one transaction."""
        return lambda handler: Subscription(self, group, handler, batch=True, projection=projection)

    def each(self, message: type[Message], *, group: str) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, tx)``; records of other types on the topic are passed over."""
        return lambda handler: Subscription(self, group, handler, message=message)

    def outside(self, *, group: str) -> Callable[[Handler], Subscription]:
        """The handler takes ``(records)``, a list of messages with id and headers, for an effect that is not in
        PostgreSQL: at least once, in no transaction. What it refuses by InvalidMessage becomes a dead letter alone.
        """
        return lambda handler: Subscription(self, group, handler, batch=True, outside=True)

    def tail(self, *, group: str, begins: Handler) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, headers)``: each new record, in every process of `group`, outside any
        transaction, and never again.

        `begins` takes no message: it is called whenever earlier records may have been missed. Both are given the
        adapters.
        """
        return lambda handler: Subscription(self, group, handler, tail=begins)


@dataclass(frozen=True)
class Exchange:
    """A RabbitMQ exchange. `kind`: topic, direct or fanout."""

    name: str
    kind: str


@dataclass(frozen=True)
class Queue:
    """A RabbitMQ quorum queue: work for one service, retried by the ladder, then a dead letter.

    `retries`: the delay before each further attempt; one wait queue per distinct delay. `expires`: what is older
    is dead-lettered instead of handled. A family such as ``channel.inbound.{type}`` is one Queue per type.
    """

    name: str
    exchange: Exchange
    routing_key: str
    message: type[Message]
    producers: tuple[str, ...]
    consumer: str
    retries: tuple[timedelta, ...]
    expires: timedelta | None = None
    max_length: int = 1_000_000

    @property
    def dead_letter_queue(self) -> str:
        return f"{self.name}.dlq"

    def retry_queue(self, delay: timedelta) -> str:
        return f"{self.name}.retry.{int(delay.total_seconds() * 1000)}ms"

    def worker(self, *, prefetch: int) -> Callable[[Handler], Subscription]:
        """The handler takes ``(message, tx)`` and is quick: it stores the work; ack follows the commit."""
        return lambda handler: Subscription(self, self.consumer, handler, message=self.message, prefetch=prefetch)


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
