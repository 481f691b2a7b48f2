"""Publishes the rows of the outbox to RabbitMQ: persistent, confirmed, in the order of their keys."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractRobustConnection
from aio_pika.exceptions import ChannelInvalidStateError, DeliveryError, PublishError

from infra.bus.outbox import HeldBack, Outcome, Pending, Unpublishable
from infra.postgres.tx import MAX_MESSAGE_BYTES

CONFIRMS_IN_FLIGHT = 100
# After two heartbeats without a sign of a client, the broker gives its messages to others. The default of 60 s is long.
HEARTBEAT_SECONDS = 10
# One attempt to connect. A broker that starts can accept a connection long before it answers on it.
CONNECT_SECONDS = 5.0
RECONNECT_SECONDS = 1.0


def with_heartbeat(url: str) -> str:
    """The URL of the broker with our heartbeat."""
    return url + ("&" if "?" in url else "?") + f"heartbeat={HEARTBEAT_SECONDS}"


class RabbitPublisher:
    """Publishes outbox rows: persistent, confirmed, mandatory."""

    bus = "rabbit"

    def __init__(self, url: str) -> None:
        self._url = with_heartbeat(url)
        self._connection: AbstractRobustConnection | None = None
        self._channel: AbstractChannel | None = None
        self._in_flight = asyncio.Semaphore(CONFIRMS_IN_FLIGHT)
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Connects if it is not connected yet."""
        # Two callers at the same time would both connect. One of the connections would never be closed.
        async with self._starting:
            if self._connection is None:
                connection = await aio_pika.connect_robust(
                    self._url, timeout=CONNECT_SECONDS, reconnect_interval=RECONNECT_SECONDS
                )
                try:
                    self._channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                except BaseException:
                    await connection.close()
                    raise
                self._connection = connection

    async def stop(self) -> None:
        if self._connection is not None:
            await self._connection.close()

    async def publish(self, rows: Sequence[Pending]) -> list[Outcome]:
        await self.start()
        by_key: dict[str, list[Pending]] = defaultdict(list)
        for row in rows:
            by_key[row.key].append(row)
        outcomes: dict[int, Outcome] = {}
        ended = await asyncio.gather(
            *(self._publish_in_order(of_key, outcomes) for of_key in by_key.values()), return_exceptions=True
        )
        for error in ended:
            if error is not None:
                raise error
        return [outcomes[row.position] for row in rows]

    async def _publish_in_order(self, rows: Sequence[Pending], outcomes: dict[int, Outcome]) -> None:
        """Publishes the rows of one key. Behind a row that the broker refuses the others are not sent: the broker could
        take them, and then they would overtake it."""
        outcome: Outcome = None
        for row in rows:
            if not isinstance(outcome, HeldBack):
                outcome = await self._outcome(row)
            outcomes[row.position] = outcome

    async def _outcome(self, row: Pending) -> Outcome:
        if len(row.body) > MAX_MESSAGE_BYTES:
            return Unpublishable(f"body: must have at most {MAX_MESSAGE_BYTES} bytes, not {len(row.body)}")
        try:
            await self.send(row.destination, row.routing_key, row.body, row.headers, str(row.message_id))
        except PublishError:
            # A broker can forget a binding in a power cut; the provisioning makes it again.
            unbound = f"no queue is bound to routing key {row.routing_key!r}"
            return HeldBack(f"exchange {row.destination}: {unbound}; run claw up")
        except DeliveryError:
            return HeldBack(f"exchange {row.destination}: the queue of routing key {row.routing_key!r} is full")
        return None

    async def send(
        self, exchange: str, routing_key: str, body: bytes, headers: Mapping[str, Any], message_id: str
    ) -> None:
        """Returns when the broker has confirmed the message.

        Raises PublishError if no queue is bound, DeliveryError if the queue refuses, and AMQPError or OSError while the
        broker is away.
        """
        await self.start()
        assert self._channel is not None
        message = aio_pika.Message(
            body,
            headers=dict(headers),
            message_id=message_id,
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        async with self._in_flight:
            try:
                if self._channel.is_closed:
                    raise ChannelInvalidStateError
                # An exchange of the library would let each message wait until the one before it is written, which takes
                # three turns of the event loop. If much other work makes a turn long, replies would wait for minutes.
                channel = await self._channel.get_underlay_channel()
                await channel.basic_publish(  # type: ignore[call-arg]  # its abstract class lacks `wait`
                    body,
                    exchange=exchange,
                    routing_key=routing_key,
                    properties=message.properties,
                    mandatory=True,
                    wait=False,
                )
            except ChannelInvalidStateError as error:
                raise ConnectionError("RabbitMQ: not connected; it is connecting again") from error
            except asyncio.CancelledError as error:
                # The library cancels a publish when it closes the connection. If this error went on, it would end the
                # relay, and a worker would keep its message without ever processing it.
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                raise ConnectionError(
                    "RabbitMQ: connection closed because the broker did not answer in time"
                ) from error
