"""Redrive: a service works off those of its dead letters that an operator has asked for.

The operator's side marks rows (`request_redrive`, `discard`), each in a transaction with its audit record. The
service's side (`Drainer`) handles them by the same handlers and the same inbox as a first delivery. Once the failed
head of a parked key is through or discarded, what waited behind it follows by itself, in order, up to the next failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec

from infra.bus.dispatch import decode, handle
from infra.clock import utcnow, uuid7_time
from infra.errors import Conflict, NotFound, describe
from infra.lanes.lane import KEEP_EFFECTS, restore
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.db import is_transient
from infra.postgres.inbox import mark_handled
from infra.postgres.lane_items import NewItem
from infra.postgres.tx import Database, OutboxRow, Tx, insert_outbox
from infra.security.audit import audit
from protos.topology import Subscription, Topic

POLL_SECONDS = 1.0
_COLUMNS = (
    *("id", "consumer", "source", "destination", "place", "message_id", "key", "tenant_id", "state"),
    *("headers", "payload"),
)
# At most so many a second: a redrive of thousands must leave room for what comes in.
PER_SECOND = 100
# The inbox forgets after 120 days (see inbox_partitions); beyond this a redrive could repeat an effect.
DEDUPE_HORIZON = timedelta(days=115)


async def request_redrive(tx: Tx, ids: Sequence[UUID], *, actor: str, force: bool = False) -> int:
    """Asks the service to handle these dead letters again. Returns how many it will.

    Raises NotFound for an id that is not there, Conflict for one that waits behind another, is under way, or is
    older than the inbox remembers (unless `force`).
    """
    for id_ in ids:
        state, message_id, consumer, source, age = await _locked(tx, id_)
        if state == "waiting":
            raise Conflict(
                f"dead letter {id_}: it waits behind a failed one of its key; redrive or discard that, this one follows"
            )
        if state != "failed":
            raise Conflict(f"dead letter {id_}: it is {state}; only a failed one is redriven")
        if source == "lane":
            told = age < KEEP_EFFECTS
        else:
            sent_at = None if message_id.startswith("sha256:") else uuid7_time(UUID(message_id))
            told = sent_at is not None and utcnow() - sent_at <= DEDUPE_HORIZON
        if not told and not force:
            raise Conflict(f"dead letter {id_}: too old, or without an id, to be told from a repeat; force it to go on")
        await tx.sql("UPDATE dead_letter SET state = 'redriving' WHERE id = $1", id_)
        audit(tx, actor, "dead_letter.redrive", "dead_letter", str(id_), consumer=consumer)
    return len(ids)


async def discard(tx: Tx, id_: UUID, *, actor: str) -> None:
    """Gives a dead letter up for good: it is kept, and a later copy of its message is dropped as handled.

    Raises NotFound, and Conflict for one that is not open.
    """
    state, message_id, consumer, *_ = await _locked(tx, id_)
    if state not in ("failed", "waiting"):
        raise Conflict(f"dead letter {id_}: it is {state}; only an open one is discarded")
    await tx.sql("UPDATE dead_letter SET state = 'discarded' WHERE id = $1", id_)
    if not message_id.startswith("sha256:"):
        await mark_handled(await tx.connection(), consumer, [UUID(message_id)])
    audit(tx, actor, "dead_letter.discard", "dead_letter", str(id_), consumer=consumer)


async def _locked(tx: Tx, id_: UUID) -> tuple[str, str, str, str, timedelta]:
    rows = await tx.sql(
        "SELECT state, message_id, consumer, source, clock_timestamp() - first_failed_at FROM dead_letter "
        "WHERE id = $1 FOR UPDATE",
        id_,
    )
    if not rows:
        raise NotFound(f"dead letter {id_}: there is none")
    state, message_id, consumer, source, age = rows[0]
    return state, message_id, consumer, source, age


class Drainer:
    """Works off a service's requested dead letters until stopped. Several processes may do so at once."""

    def __init__(self, database: Database, subscriptions: Sequence[Subscription], metrics: Metrics) -> None:
        self._database = database
        self._metrics = metrics
        self._handlers: dict[tuple[str, str], list[Subscription]] = {}
        for subscription in subscriptions:
            if isinstance(subscription.source, Topic):
                self._handlers.setdefault((subscription.group, subscription.source.name), []).append(subscription)
        self._stopping = asyncio.Event()
        self._log = get_logger("infra.service.redrive")

    async def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        while not self._stopping.is_set():
            try:
                idle = not await self.step()
            except Exception as error:
                idle = True
                self._log.warning(
                    "dead letters cannot be worked off now",
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
            try:
                await asyncio.wait_for(self._stopping.wait(), POLL_SECONDS if idle else 1 / PER_SECOND)
            except TimeoutError:
                continue

    async def step(self) -> bool:
        """Handles one dead letter, or unparks a key with nothing left; False when there is nothing to do."""
        letter: Mapping[str, Any] | None = None
        try:
            async with self._database.begin() as tx:
                key = await self._claim_key(tx)
                letter = await (self._claim_head(tx, *key) if key else self._claim_other(tx))
                if letter is None:
                    return key is not None
                await self._again(tx, letter)
                await tx.sql(
                    "UPDATE dead_letter SET state = 'redriven', attempts = attempts + 1 WHERE id = $1",
                    letter["id"],
                )
        except Exception as error:
            if letter is None or is_transient(error):
                raise
            await self._failed(letter, error)
            return True
        self._log.info("dead letter redriven", id=str(letter["id"]), consumer=letter["consumer"])
        return True

    async def _claim_key(self, tx: Tx) -> tuple[Any, ...] | None:
        """A parked key whose head may be handled, or that has none left; its row is locked."""
        keys = await tx.sql(
            "SELECT consumer, topic, key FROM parked_key p LEFT JOIN LATERAL (SELECT state FROM dead_letter d WHERE "
            "d.consumer = p.consumer AND d.source = 'kafka' AND d.destination = p.topic AND d.key = p.key "
            "AND d.state IN ('failed', 'waiting', 'redriving') ORDER BY seq LIMIT 1) head ON true "
            "WHERE head.state IS DISTINCT FROM 'failed' ORDER BY parked_at LIMIT 1 FOR UPDATE OF p SKIP LOCKED"
        )
        return keys[0] if keys else None

    async def _claim_head(self, tx: Tx, *key: str) -> Mapping[str, Any] | None:
        """The head of a parked key, locked; where there is none the key is unparked."""
        head = await self._row(
            tx,
            # Waits for whoever has the head locked (an operator, a drainer that notes its failure). Passing over it
            # would handle the next one before it, or unpark the key in front of it.
            "consumer = $1 AND source = 'kafka' AND destination = $2 AND key = $3 "
            "AND state IN ('failed', 'waiting', 'redriving') ORDER BY seq LIMIT 1 FOR UPDATE",
            *key,
        )
        if head is None:
            await tx.sql("DELETE FROM parked_key WHERE consumer = $1 AND topic = $2 AND key = $3", *key)
            self._log.info("key unparked", consumer=key[0], topic=key[1], key=key[2])
        return head if head and head["state"] != "failed" else None

    async def _claim_other(self, tx: Tx) -> Mapping[str, Any] | None:
        """A letter to redrive that has no parked key: its row is locked."""
        return await self._row(
            tx,
            "state = 'redriving' AND NOT EXISTS (SELECT FROM parked_key p WHERE p.consumer = d.consumer "
            "AND p.topic = d.destination AND p.key = d.key AND d.source = 'kafka') "
            "ORDER BY seq LIMIT 1 FOR UPDATE SKIP LOCKED",
        )

    async def _row(self, tx: Tx, where: str, *arguments: Any) -> Mapping[str, Any] | None:
        rows = await tx.sql(f"SELECT {', '.join(_COLUMNS)} FROM dead_letter d WHERE {where}", *arguments)
        return dict(zip(_COLUMNS, rows[0], strict=True)) if rows else None

    async def _again(self, tx: Tx, letter: Mapping[str, Any]) -> None:
        headers = msgspec.json.decode(letter["headers"], type=dict[str, str])
        if letter["source"] == "kafka":
            handlers = self._handlers[letter["consumer"], letter["destination"]]
            topic = handlers[0].source
            assert isinstance(topic, Topic)
            decoded = decode(headers, letter["payload"], topic.messages)
            if await mark_handled(await tx.connection(), letter["consumer"], [decoded.id]):
                await handle(handlers, [decoded], tx, group=letter["consumer"])
            return
        if letter["source"] == "lane":
            await restore(
                tx,
                NewItem(
                    letter["consumer"],
                    letter["tenant_id"] or "",
                    letter["key"],
                    UUID(letter["message_id"]),
                    letter["payload"],
                    letter["headers"],
                ),
            )
            return
        # A queue's message goes back to its queue, an outbox row to its bus: through the outbox, ids unchanged.
        row = OutboxRow(
            "rabbit" if letter["source"] == "rabbit" or letter["place"] else "kafka",
            UUID(letter["message_id"]),
            "" if letter["source"] == "rabbit" else letter["destination"],
            letter["destination"] if letter["source"] == "rabbit" else letter["place"],
            letter["key"] or letter["message_id"],
            msgspec.json.encode({k: v for k, v in headers.items() if not k.startswith("x-")}).decode(),
            letter["payload"],
            timedelta(hours=24),
        )
        await insert_outbox(await tx.connection(), [row])

    async def _failed(self, letter: Mapping[str, Any], error: Exception) -> None:
        async with self._database.begin() as tx:
            await tx.sql(
                "UPDATE dead_letter SET state = 'failed', attempts = attempts + 1, error = $2, "
                # Not where another drainer, meanwhile, had more success with it.
                "last_failed_at = clock_timestamp() WHERE id = $1 AND state = $3",
                letter["id"],
                describe(error)[:4000].replace("\x00", "\\x00"),
                letter["state"],
            )
        self._metrics.dead_letters.labels(letter["consumer"]).inc()
        self._log.error(
            "dead letter failed again",
            id=str(letter["id"]),
            consumer=letter["consumer"],
            error=describe(error),
        )
