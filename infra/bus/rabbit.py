"""The workers that take messages off RabbitMQ's queues.

A worker's handler is quick: it stores the work in one transaction. The acknowledgement follows the commit. After a
crash between the two the broker delivers the message again, and the inbox drops it. Attempts are counted in a header of
our own, because the broker also counts messages that were only prefetched when a process stopped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from aio_pika.exceptions import AMQPError, ChannelInvalidStateError
from faststream import AckPolicy
from faststream.rabbit import Channel, RabbitBroker, RabbitMessage, RabbitQueue

from infra.bus.dispatch import Decoded, decode, readable_id
from infra.bus.kafka import headers_json
from infra.bus.rabbit_publisher import CONNECT_SECONDS, RECONNECT_SECONDS, RabbitPublisher, with_heartbeat
from infra.clock import utcnow
from infra.errors import InvalidMessage, RetryLater, describe
from infra.failpoint import failpoint
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import is_of_database, is_transient
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.inbox import mark_handled
from infra.postgres.tx import Tx
from protos.envelope import Envelope
from protos.topology import Queue, Subscription

ATTEMPT = "x-claw-attempt"


class Workers:
    """The consumers of a service's queues, and of their dead-letter queues."""

    def __init__(
        self,
        database: Database,
        subscriptions: Sequence[Subscription],
        url: str,
        metrics: Metrics,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._publisher = RabbitPublisher(url)
        self._log = get_logger("infra.bus.rabbit")
        # FastStream's typed injection and acknowledgement are off: handlers get bytes, and this module acknowledges.
        self._broker = RabbitBroker(
            with_heartbeat(url),
            apply_types=False,
            graceful_timeout=30.0,
            logger=None,
            timeout=CONNECT_SECONDS,
            reconnect_interval=RECONNECT_SECONDS,
        )
        for subscription in subscriptions:
            queue = subscription.source
            assert isinstance(queue, Queue)
            metrics.dead_letters.labels(queue.name)
            kind = _BatchWorker if subscription.batch else _Worker
            self._subscribe(queue.name, subscription.prefetch, kind(self, subscription, queue))
            self._subscribe(queue.dead_letter_queue, 20, _Collector(self, queue))

    def _subscribe(self, name: str, prefetch: int, handler: Any) -> None:
        self._broker.subscriber(
            RabbitQueue(name, declare=False),
            ack_policy=AckPolicy.MANUAL,
            channel=Channel(prefetch_count=prefetch, on_return_raises=True),
            decoder=_undecoded,
            no_reply=True,
        )(handler)

    async def start(self) -> None:
        """Raises AMQPError or OSError while the broker is away, and if a queue is not provisioned."""
        await self._publisher.start()
        await self._broker.start()

    async def ping(self) -> bool:
        return await self._broker.ping(timeout=2.0)

    async def stop(self) -> None:
        """Takes no more messages, and waits for the handlers that are running."""
        await self._broker.stop()
        await self._publisher.stop()

    async def dead_letter(self, queue: Queue, message: RabbitMessage, error: str, attempts: int) -> None:
        headers = {str(name): str(value) for name, value in message.headers.items()}
        letter = DeadLetter(
            destination=queue.name,
            place=queue.routing_key,
            message_id=readable_id(headers, message.body),
            key=headers.get("ce_subject"),
            tenant_id=headers.get("tenant_id"),
            attempts=attempts,
            error=error,
            headers=headers_json(headers),
            payload=message.body,
        )
        async with self._database.begin() as tx:
            await store_dead_letters(await tx.connection(), queue.name, "rabbit", [letter], self._database.sealing)
        self._metrics.dead_letters.labels(queue.name).inc()
        self._log.error(
            "message stored as a dead letter; see ./claw dlq list",
            queue=queue.name,
            tenant=letter.tenant_id,
            message_id=letter.message_id,
            attempts=attempts,
            error=error,
        )

    async def retry(self, queue: Queue, message: RabbitMessage, attempt: int, delay: timedelta) -> None:
        """Sends a copy to the wait queue, then acks. A crash in between leaves two copies: the inbox drops one."""
        headers = {**message.headers, ATTEMPT: attempt}
        await self._publisher.send("", queue.retry_queue(delay), message.body, headers, str(message.message_id))
        failpoint("after_retry_before_ack")
        await self.answer(queue, message.ack())
        self._metrics.retries.labels(queue.name).inc()

    async def answer(self, queue: Queue, answer: Awaitable[None]) -> None:
        """Acknowledges or returns messages. If their channel was closed meanwhile, the broker delivers them again, and
        the inbox drops those that were handled."""
        try:
            await answer
        except (AMQPError, ChannelInvalidStateError, OSError) as error:
            self._log.warning(
                "could not acknowledge messages, because the connection was closed; the broker delivers them again",
                queue=queue.name,
                error=describe(error),
            )


async def _undecoded(message: RabbitMessage) -> RabbitMessage:
    return message


class _Worker:
    """The handler of one queue, with its transaction, retries and dead letters."""

    def __init__(self, workers: Workers, subscription: Subscription, queue: Queue) -> None:
        self._workers = workers
        self._subscription = subscription
        self._queue = queue
        self.__name__ = subscription.name  # FastStream names the consumer by it

    async def __call__(self, message: RabbitMessage) -> None:
        queue = self._queue
        workers = self._workers
        headers = {str(name): str(value) for name, value in message.headers.items()}
        attempt = int(message.headers.get(ATTEMPT, 1))
        destination = f"{queue.exchange.name}:{queue.routing_key}"
        try:
            with telemetry.process("rabbitmq", destination, headers, queue=queue.name, age=_age(headers)):
                await self._handle(message.body, headers)
        except Exception as error:
            await self._failed(message, attempt, error)
            return
        failpoint("after_commit_before_ack")
        await workers.answer(queue, message.ack())
        workers._metrics.processed.labels(queue.name, "handled").inc()

    def _decode(self, body: bytes, headers: Mapping[str, str]) -> tuple[Decoded, Envelope]:
        decoded = decode(headers, body, (self._queue.message,))
        envelope = decoded.envelope()
        if self._queue.expires is not None and envelope.time + self._queue.expires < utcnow():
            raise InvalidMessage("header ce_time", f"must not be older than {self._queue.expires}")
        return decoded, envelope

    async def _handle(self, body: bytes, headers: Mapping[str, str]) -> None:
        decoded, envelope = self._decode(body, headers)

        async def work(tx: Tx) -> None:
            if await mark_handled(await tx.connection(), self._queue.name, [decoded.id]):
                await self._call(tx, [decoded])
                failpoint("after_effect_before_commit")

        await self._workers._database.run(work, tenant_id=envelope.tenant_id, cause=envelope)

    async def _call(self, tx: Tx, decoded: Sequence[Decoded]) -> None:
        for each in decoded:
            await self._subscription.handler(each.message, tx)

    async def _failed(self, message: RabbitMessage, attempt: int, error: Exception) -> None:
        queue = self._queue
        workers = self._workers
        workers._log.warning(
            "could not process a message",
            queue=queue.name,
            message_id=message.message_id,
            attempt=attempt,
            error=describe(error),
            exc_info=not isinstance(error, InvalidMessage) and not is_transient(error),
        )
        try:
            if is_of_database(error):
                # The database is away. This is not the message's fault, so the attempt does not count.
                await workers.retry(queue, message, attempt, queue.retries[0])
            elif isinstance(error, InvalidMessage) or attempt > len(queue.retries):
                await workers.dead_letter(queue, message, describe(error), attempt)
                failpoint("after_dead_letter_before_ack")
                await workers.answer(queue, message.ack())
            else:
                rung = queue.retries[attempt - 1]
                if isinstance(error, RetryLater):
                    rung = next((delay for delay in queue.retries if delay >= error.after), queue.retries[-1])
                await workers.retry(queue, message, attempt + 1, rung)
        except Exception as second:
            # Neither a dead letter nor delayed: it goes back to its queue, and the broker keeps it.
            workers._log.error(
                "could not store or delay a failed message; returned it to its queue",
                queue=queue.name,
                message_id=message.message_id,
                error=describe(second),
            )
            # Without this pause the broker would deliver it again at once, and soon reach its delivery limit.
            await asyncio.sleep(1)
            await workers.answer(queue, message.nack(requeue=True))


class _BatchWorker(_Worker):
    """The handler of one queue for groups of messages: one transaction and one acknowledgement for all that wait.

    While one group is handled, the next one gathers. If a group fails, its halves are handled: a message that fails
    alone costs a few transactions, and not one for each message of all tenants.
    """

    def __init__(self, workers: Workers, subscription: Subscription, queue: Queue) -> None:
        super().__init__(workers, subscription, queue)
        self._largest = subscription.prefetch // 2
        self._waiting: deque[tuple[RabbitMessage, asyncio.Future[None]]] = deque()
        self._working: asyncio.Task[None] | None = None

    async def __call__(self, message: RabbitMessage) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((message, done))
        if self._working is None:
            self._working = asyncio.create_task(self._work(), name=f"group of {self._queue.name}")
        # Shielded: when the service stops, the group that is being handled is finished and acknowledged.
        await asyncio.shield(done)

    async def _work(self) -> None:
        try:
            while self._waiting:
                group = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._largest))]
                try:
                    await self._process([message for message, _ in group])
                finally:
                    for _, done in group:
                        if not done.done():
                            done.set_result(None)
                await asyncio.sleep(0)
        finally:
            self._working = None

    async def _process(self, group: Sequence[RabbitMessage]) -> None:
        """Every message of the group is acknowledged, delayed or stored as a dead letter when this returns."""
        queue, workers = self._queue, self._workers
        if len(group) == 1:
            # Handled as in a worker for single messages: in its own trace.
            await super().__call__(group[0])
            return
        try:
            decoded = {each.id: each for message in group for each, _ in [self._decoded(message)]}
            with telemetry.process_batch(
                "rabbitmq", f"{queue.exchange.name}:{queue.routing_key}", [each.headers for each in decoded.values()]
            ):
                await workers._database.run(partial(self._group, decoded))
        except Exception as error:
            if not isinstance(error, InvalidMessage):
                workers._log.warning(
                    "could not process a group of messages; will process its halves",
                    queue=queue.name,
                    messages=len(group),
                    error=describe(error),
                )
            half = len(group) // 2
            await self._process(group[:half])
            await self._process(group[half:])
            return
        failpoint("after_commit_before_ack")
        # Groups are handled in the order of delivery, so all messages before the last one of this group are settled.
        await workers.answer(queue, group[-1].ack(multiple=True))
        workers._metrics.processed.labels(queue.name, "handled").inc(len(group))

    def _decoded(self, message: RabbitMessage) -> tuple[Decoded, Envelope]:
        return self._decode(message.body, {str(name): str(value) for name, value in message.headers.items()})

    async def _group(self, decoded: Mapping[UUID, Decoded], tx: Tx) -> None:
        fresh = await mark_handled(await tx.connection(), self._queue.name, list(decoded))
        if fresh:
            await self._call(tx, [each for id_, each in decoded.items() if id_ in fresh])
            failpoint("after_effect_before_commit")

    async def _call(self, tx: Tx, decoded: Sequence[Decoded]) -> None:
        tx.origins.update((id(each.message), each.headers) for each in decoded)
        await self._subscription.handler([each.message for each in decoded], tx)


class _Collector:
    """Moves the messages that the broker dead-lettered (crash loop, expiry, overflow) into the table."""

    def __init__(self, workers: Workers, queue: Queue) -> None:
        self._workers = workers
        self._queue = queue
        self.__name__ = f"dead letters of {queue.name}"

    async def __call__(self, message: RabbitMessage) -> None:
        reason = str(message.headers.get("x-first-death-reason", "rejected"))
        attempts = int(message.headers.get(ATTEMPT, 1))
        try:
            await self._workers.dead_letter(self._queue, message, f"dead-lettered by the broker: {reason}", attempts)
        except Exception as error:
            self._workers._log.warning(
                "could not store a dead letter; it stays in its queue", queue=self._queue.name, error=describe(error)
            )
            await asyncio.sleep(1)
            await self._workers.answer(self._queue, message.nack(requeue=True))
            return
        await self._workers.answer(self._queue, message.ack())


def _age(headers: Mapping[str, str]) -> timedelta:
    try:
        return max(utcnow() - datetime.fromisoformat(headers["ce_time"]).astimezone(UTC), timedelta())
    except (KeyError, ValueError):
        return timedelta()
