"""Moves accepted messages, the oldest of each tenant first, into their conversations. Decision 13 has the reasons."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
from msgspec.structs import replace

from infra.clock import wait_at_most
from infra.errors import describe
from infra.failpoint import failpoint
from infra.observe.logs import get_logger
from infra.postgres.db import is_transient
from infra.postgres.tx import Tx
from services.channel.intake.conversations import AcceptedMessage, UniqueMessage, store
from services.channel.intake.ingest import MAX_DIRECT, Ingest

# The most messages in one transaction. 50 cost a sixth more CPU each, here and in PostgreSQL. 200 cost as much as 100,
# and calls would wait longer for their turn.
DRAIN_ROWS = 100
# Under load the drainer pauses for this many times as long as its last transaction took: calls get the larger share of
# the processor, and rows gather for the next transaction. The pause is shorter if the messages have waited longer, and
# there is none after MAX_BEHIND. So under lasting load the drainer takes the share that it needs. With full pauses and
# then none, it would take all of the processor at times, and calls would wait for it.
DRAIN_PAUSE = 4.0
MAX_BEHIND = timedelta(seconds=5)
MAX_PAUSE_SECONDS = 0.5
# The drainer looks this often for rows that another process accepted before it died.
DRAIN_POLL_SECONDS = 5.0
# The delay before a message is drained again that could not be drained.
RETRY_DELAY = timedelta(minutes=1)
# Longer than the retry horizon of every vendor. WhatsApp has the longest: seven days.
KEEP_SEEN = timedelta(days=30)
# Few rows at a time, so that the drainer is soon back at its work.
CLEANING_SECONDS = 1.0
CLEANING_ROWS = 2_000

_log = get_logger("channel.drainer")

# The rows are locked in the order of the key, a tenant's from its oldest one on. A second drainer waits for that row,
# and so for the end of the first one's transaction: messages enter a conversation in the order in which they were
# accepted.
_DRAIN = "SELECT * FROM drain_accepted($1)"


class Drainer:
    """Drains the messages that this process or a dead one has accepted, and prunes the dedupe rows."""

    def __init__(self, ingest: Ingest) -> None:
        self._ingest = ingest
        self._database = ingest.database
        self._cleaned_at = time.monotonic()
        self._stopping = False

    async def run(self) -> None:
        while not self._stopping:
            began = time.monotonic()
            try:
                drained = await self.drain()
            except Exception as error:
                _log.warning("could not drain accepted messages; will retry in 1 s", error=describe(error))
                await wait_at_most(1.0, self._ingest.accepted)
                continue
            ended = time.monotonic()
            if ended - self._cleaned_at > CLEANING_SECONDS:
                await self._clean()
            if drained == 0:
                await wait_at_most(DRAIN_POLL_SECONDS, self._ingest.accepted)
            elif drained > MAX_DIRECT and self._ingest.accepted.is_set():
                # Load: rows were accepted meanwhile.
                longest = max(self._ingest.backlog.values(), default=timedelta(0))
                share = max(0.0, 1 - longest / MAX_BEHIND)
                await asyncio.sleep(min(MAX_PAUSE_SECONDS, DRAIN_PAUSE * share * (ended - began)))

    async def stop(self) -> None:
        self._stopping = True
        self._ingest.accepted.set()

    async def drain(self) -> int:
        """Moves the oldest accepted messages of the tenants into their conversations. Returns their number."""
        self._ingest.accepted.clear()
        try:
            return await self._drain(DRAIN_ROWS)
        except Exception as error:
            if is_transient(error):
                raise
            # One of the messages is at fault. Each alone: the others must not wait for it.
            _log.warning("could not drain accepted messages together; draining them one by one", error=describe(error))
        drained = 0
        while drained < DRAIN_ROWS and await self._drain_one():
            drained += 1
        return drained

    async def _drain(self, limit: int) -> int:
        failpoint("before_drain")

        async def work(tx: Tx) -> Sequence[tuple[Any, ...]]:
            rows = sorted(await tx.sql(_DRAIN, limit))
            messages = [self._open(hash_, sealed, trace, at) for _, hash_, sealed, trace, at, *_ in rows]
            await store(tx, self._ingest.subjects, await _with_agents(tx, await _for_the_bot(tx, messages)))
            failpoint("before_drain_commit")
            return rows

        rows = await self._database.run(work)
        failpoint("after_drain")
        self._ingest.backlog = {tenant: age for *_, age, tenant, is_behind in rows if is_behind}
        if not self._ingest.backlog and not self._ingest.accepted.is_set():
            self._ingest.is_behind = False
        return len(rows)

    async def _drain_one(self) -> int:
        try:
            return await self._drain(1)
        except Exception as error:
            if is_transient(error):
                raise
            rows = await self._database.autocommit(
                """
                UPDATE accepted SET attempts = attempts + 1, retry_at = clock_timestamp() + $1::interval
                WHERE position = (
                    SELECT position FROM accepted WHERE retry_at IS NULL OR retry_at < clock_timestamp()
                    ORDER BY position LIMIT 1 FOR UPDATE
                )
                RETURNING channel_id, attempts
                """,
                RETRY_DELAY,
            )
            for channel_id, attempts in rows:
                _log.error(
                    f"could not drain an accepted message; will retry in {RETRY_DELAY.total_seconds():g} s",
                    channel_id=str(channel_id),
                    attempts=attempts,
                    exc_info=True,
                )
            return len(rows)

    def _open(self, hash_: bytes, sealed: bytes, traceparent: str | None, accepted_at: datetime) -> UniqueMessage:
        content = self._ingest.cipher.open(sealed, "accepted", hash_.hex())
        message = msgspec.json.decode(content, type=AcceptedMessage)
        return UniqueMessage(replace(message, received_at=accepted_at), hash_, traceparent)

    async def _clean(self) -> None:
        self._cleaned_at = time.monotonic()
        try:
            await self._database.autocommit(
                """
                DELETE FROM inbound_seen WHERE hash IN (
                    SELECT hash FROM inbound_seen WHERE seen_at < now() - $1::interval LIMIT $2
                )
                """,
                KEEP_SEEN,
                CLEANING_ROWS,
            )
        except Exception as error:
            _log.warning(
                f"could not prune inbound_seen; will retry in {CLEANING_SECONDS:g} s or later", error=describe(error)
            )


async def _for_the_bot(tx: Tx, messages: Sequence[UniqueMessage]) -> Sequence[UniqueMessage]:
    """Drops parts of albums that have no part for the bot."""
    albums = {new.message.album for new in messages} - {b""}
    if not albums:
        return messages
    rows = await tx.sql("SELECT hash FROM inbound_seen WHERE hash = ANY($1::bytea[])", sorted(albums))
    others = albums - {hash_ for (hash_,) in rows}
    await tx.sql(
        "UPDATE inbound_seen SET ignored = $2 WHERE hash = ANY($1::bytea[])",
        sorted(new.hash for new in messages if new.message.album in others),
        "a part of an album of a group that is not for the bot",
    )
    return [new for new in messages if new.message.album not in others]


async def _with_agents(tx: Tx, messages: Sequence[UniqueMessage]) -> Sequence[UniqueMessage]:
    """The messages, with the agents that the commands of their albums name."""
    albums = {new.message.agent_album for new in messages} - {b""}
    if not albums:
        return messages
    rows = await tx.sql("SELECT hash, event_id FROM inbound_seen WHERE hash = ANY($1::bytea[])", sorted(albums))
    agents = {hash_: UUID(str(agent_id)) for hash_, agent_id in rows}
    return [
        new._replace(message=replace(new.message, agent_id=agents.get(new.message.agent_album, new.message.agent_id)))
        for new in messages
    ]
