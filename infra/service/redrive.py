"""Redrive: a service handles again the dead letters that an operator has chosen.

The operator's side marks rows (`request_redrive`, `discard`), each in a transaction with its audit record. The
service's side (`Redriver`) handles the marked rows with the same handlers and the same inbox as a first delivery. When
the failed head of a parked key is handled or discarded, the records behind it follow in order, up to the next failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec

from infra.bus.dispatch import decode, handle
from infra.clock import wait_at_most
from infra.errors import Conflict, NotFound, describe
from infra.lanes.lane import KEEP_EFFECTS, restore
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import is_of_database, is_transient, storable
from infra.postgres.dead_letters import OPEN, OPEN_FOR, SealedPayload, open_payload
from infra.postgres.inbox import mark_handled
from infra.postgres.lane_items import NewItem
from infra.postgres.outbox_rows import OutboxRow, insert_outbox
from infra.postgres.tx import Tx
from infra.security.audit import audit
from protos.topology import Subscription, Topic

POLL_SECONDS = 1.0
_COLUMNS = (
    *("id", "consumer", "source", "destination", "place", "message_id", "key", "tenant_id", "state"),
    *("headers", "payload", "subject_id", "sealed"),
)
PER_SECOND = 100
"""The most dead letters a second: a redrive of thousands must leave room for new messages."""
DEDUPE_HORIZON = timedelta(days=115)
"""The inbox keeps ids for 120 days (see inbox_partitions); a redrive of an older message could repeat an effect."""
RECOGNISED = f"""
    CASE
        WHEN source = 'lane' THEN
            clock_timestamp() - first_failed_at < interval '{KEEP_EFFECTS.total_seconds()} seconds'
        -- Compared as text, because an id may have any form.
        ELSE message_id NOT LIKE 'sha256:%' AND message_id COLLATE "C"
            >= uuid7_floor(clock_timestamp() - interval '{DEDUPE_HORIZON.total_seconds()} seconds')::text
    END
    """
"""SQL: whether a repeat of the dead letter's message would be recognised."""


async def request_redrive(tx: Tx, ids: Sequence[UUID], *, actor: str, force: bool = False) -> int:
    """Marks these dead letters, so that the service handles them again. Returns their number.

    Raises NotFound for an unknown id, Conflict for a dead letter that waits behind another one, is not in the state
    ``failed``, or is older than the inbox keeps ids (unless `force`).
    """
    for id_ in ids:
        state, _, consumer, recognised = await _locked(tx, id_)
        if state == "waiting":
            raise Conflict(
                f"dead letter {id_}: waits behind a failed one of its key; redrive or discard that one first"
            )
        if state != "failed":
            raise Conflict(f"dead letter {id_}: is {state}; must be failed to be redriven")
        if not recognised and not force:
            raise Conflict(
                f"dead letter {id_}: too old or without an id: a repeat would not be recognised; use force to redrive"
            )
        await tx.sql("UPDATE dead_letter SET state = 'redriving', redrive_after = NULL WHERE id = $1", id_)
        audit(tx, actor, "dead_letter.redrive", "dead_letter", str(id_), consumer=consumer)
    return len(ids)


async def discard(tx: Tx, id_: UUID, *, actor: str) -> None:
    """Gives up a dead letter for good, and deletes its payload, which may contain people's text.

    The row stays, and a later copy of its message is dropped as handled.

    Raises NotFound, and Conflict for a dead letter that is not open.
    """
    state, message_id, consumer, _ = await _locked(tx, id_)
    if state not in ("failed", "waiting"):
        raise Conflict(f"dead letter {id_}: is {state}; must be failed or waiting to be discarded")
    await tx.sql("UPDATE dead_letter SET state = 'discarded', payload = '' WHERE id = $1", id_)
    if not message_id.startswith("sha256:"):
        await mark_handled(await tx.connection(), consumer, [UUID(message_id)])
    audit(tx, actor, "dead_letter.discard", "dead_letter", str(id_), consumer=consumer)


async def discard_expired(tx: Tx) -> None:
    """Discards open dead letters whose last failure is more than OPEN_FOR ago, 100 at a time."""
    rows = await tx.sql(
        """
        -- Locks the letters; those that an operator or a redriver works on are left for the next time.
        SELECT id, tenant_id
        FROM dead_letter
        WHERE state IN ('failed', 'waiting') AND last_failed_at < clock_timestamp() - $1::interval
        ORDER BY id
        LIMIT 100
        FOR UPDATE SKIP LOCKED
        """,
        OPEN_FOR,
    )
    for id_, tenant_id in rows:
        # Recorded in the chain of its tenant.
        tx.tenant_id = tenant_id
        await discard(tx, id_, actor=f"service:{tx.service}")
    if rows:
        get_logger("infra.service.redrive").error(
            "open dead letters discarded: their retention has ended", count=len(rows)
        )


async def _locked(tx: Tx, id_: UUID) -> tuple[str, str, str, bool]:
    """State, message id and consumer of a dead letter, and whether a repeat would be recognised. Locks its row."""
    rows = await tx.sql(
        f"""
        SELECT state, message_id, consumer, {RECOGNISED}
        FROM dead_letter
        WHERE id = $1
        FOR UPDATE
        """,
        id_,
    )
    if not rows:
        raise NotFound(f"dead letter {id_}: does not exist")
    state, message_id, consumer, recognised = rows[0]
    return state, message_id, consumer, recognised


class Redriver:
    """Handles a service's marked dead letters until stopped. Several processes may run it at the same time."""

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
                    "could not redrive dead letters; will retry in 1 s",
                    error=describe(error),
                    exc_info=not is_transient(error),
                )
            await wait_at_most(POLL_SECONDS if idle else 1 / PER_SECOND, self._stopping)

    async def step(self) -> bool:
        """Handles one dead letter, or unparks a key without open dead letters; False if there is nothing to do."""
        letter: Mapping[str, Any] | None = None
        try:
            async with self._database.begin() as tx:
                key = await self._claim_key(tx)
                letter = await (self._claim_head(tx, *key) if key else self._claim_other(tx))
                if letter is None:
                    return key is not None
                await self._handle(tx, letter)
                await tx.sql(
                    "UPDATE dead_letter SET state = 'redriven', attempts = attempts + 1 WHERE id = $1",
                    letter["id"],
                )
        except Exception as error:
            if letter is None or is_of_database(error):
                raise
            await self._failed(letter, error)
            return True
        self._log.info("dead letter redriven", id=str(letter["id"]), consumer=letter["consumer"])
        return True

    async def _claim_key(self, tx: Tx) -> tuple[Any, ...] | None:
        """A parked key whose head may be handled, or which has no open dead letter; its row is locked."""
        keys = await tx.sql(
            f"""
            -- Locks the parked key only; a key that another redriver has locked is skipped.
            SELECT consumer, topic, key
            FROM parked_key p
            LEFT JOIN LATERAL (
                SELECT state, redrive_after
                FROM dead_letter d
                WHERE d.consumer = p.consumer AND d.source = 'kafka' AND d.destination = p.topic AND d.key = p.key
                  AND {OPEN}
                ORDER BY seq
                LIMIT 1
            ) head ON true
            WHERE head.state IS DISTINCT FROM 'failed'
              AND (head.redrive_after IS NULL OR head.redrive_after <= clock_timestamp())
            ORDER BY parked_at
            LIMIT 1
            FOR UPDATE OF p SKIP LOCKED
            """
        )
        return keys[0] if keys else None

    async def _claim_head(self, tx: Tx, *key: str) -> Mapping[str, Any] | None:
        """The head of a parked key, locked. Without a head the key is unparked."""
        head = await self._row(
            tx,
            f"""
            -- Waits if another transaction has locked the head (an operator's, or a redriver's that records a failure).
            -- To skip the head would handle the next record before it, or unpark the key too early.
            consumer = $1 AND source = 'kafka' AND destination = $2 AND key = $3
            AND {OPEN}
            ORDER BY seq
            LIMIT 1
            FOR UPDATE
            """,
            *key,
        )
        if head is None:
            await tx.sql("DELETE FROM parked_key WHERE consumer = $1 AND topic = $2 AND key = $3", *key)
            self._log.info("parked key is free again", consumer=key[0], topic=key[1], key=key[2])
        return head if head and head["state"] != "failed" else None

    async def _claim_other(self, tx: Tx) -> Mapping[str, Any] | None:
        """A marked dead letter without a parked key; its row is locked."""
        return await self._row(
            tx,
            """
            state = 'redriving' AND (redrive_after IS NULL OR redrive_after <= clock_timestamp())
            AND NOT EXISTS (
                SELECT FROM parked_key p
                WHERE p.consumer = d.consumer AND p.topic = d.destination AND p.key = d.key AND d.source = 'kafka'
            )
            ORDER BY seq
            LIMIT 1
            FOR UPDATE SKIP LOCKED
            """,
        )

    async def _row(self, tx: Tx, where: str, *arguments: Any) -> Mapping[str, Any] | None:
        rows = await tx.sql(f"SELECT {', '.join(_COLUMNS)} FROM dead_letter d WHERE {where}", *arguments)
        return dict(zip(_COLUMNS, rows[0], strict=True)) if rows else None

    async def _handle(self, tx: Tx, letter: Mapping[str, Any]) -> None:
        payload = await open_payload(
            await tx.connection(),
            self._database.sealing,
            letter["tenant_id"],
            letter["message_id"],
            SealedPayload(letter["payload"], letter["subject_id"]),
            sealed=letter["sealed"],
        )
        headers = msgspec.json.decode(letter["headers"], type=dict[str, str])
        if letter["source"] == "kafka":
            handlers = self._handlers[letter["consumer"], letter["destination"]]
            topic = handlers[0].source
            assert isinstance(topic, Topic)
            decoded = decode(headers, payload, topic.messages)
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
                    payload,
                    letter["headers"],
                ),
            )
            return
        # A message of a queue returns to its queue and an outbox row to its bus: through the outbox, with the same id.
        row = OutboxRow(
            "rabbit" if letter["source"] == "rabbit" or letter["place"] else "kafka",
            UUID(letter["message_id"]),
            "" if letter["source"] == "rabbit" else letter["destination"],
            letter["destination"] if letter["source"] == "rabbit" else letter["place"],
            letter["key"] or letter["message_id"],
            msgspec.json.encode({k: v for k, v in headers.items() if not k.startswith("x-")}).decode(),
            payload,
            timedelta(hours=24),
        )
        await insert_outbox(await tx.connection(), [row])

    async def _failed(self, letter: Mapping[str, Any], error: Exception) -> None:
        async with self._database.begin() as tx:
            await tx.sql(
                """
                -- Changes nothing if another redriver has handled the dead letter since.
                UPDATE dead_letter
                SET state = 'failed', attempts = attempts + 1, error = $2, last_failed_at = clock_timestamp()
                WHERE id = $1 AND state = $3
                """,
                letter["id"],
                storable(describe(error), 4000),
                letter["state"],
            )
        self._metrics.dead_letters.labels(letter["consumer"]).inc()
        self._log.error(
            "dead letter failed again",
            id=str(letter["id"]),
            consumer=letter["consumer"],
            error=describe(error),
        )
