"""Reconciliation: compares the usage records that services committed with the verdicts that billing stored."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition
from pydantic import BaseModel

from infra.clock import utcnow
from infra.connections import kafka_options
from infra.errors import Transient
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.service.service import Runtime
from infra.web import rpc
from protos.catalog import USAGE_RECORDS
from protos.ops.v1 import ops_pb2, ops_pb2_grpc
from services.billing.rating.domain import MESSAGE
from services.billing.settings import addresses

_GROUP = "billing"
_SAFE = ["clawbus.ops.v1.Operations/CountOutbox"]
# The figures are read one after the other while records arrive, so they are read again until they agree.
_TRIES = 5
_PAUSE_SECONDS = 0.2


# Outboxes delete rows that are older than the topic's retention. Both sides count by the time in the message's id, and
# leave out the last day before that limit.
_WINDOW = USAGE_RECORDS.retention - timedelta(days=1)


class UsageReconciliation(BaseModel):
    """Numbers of usage records of the last 29 days."""

    produced: int
    """Records that their producers committed."""
    counted: int
    duplicate: int
    rejected: int
    held: int
    pending: int
    """Records without a verdict yet: in an outbox, in the topic, or here as open dead letters."""
    difference: int
    """Records that are missing or superfluous. Any value but 0 is a fault."""


class _Verdicts(NamedTuple):
    counted: int
    rejected: int
    held: int
    duplicate: int


async def reconcile(runtime: Runtime, tenant_id: str | None) -> UsageReconciliation:
    """Reconciles the records of a tenant, or of all tenants (None).

    Raises Transient if a producer does not answer, because figures without it would look like a loss.
    """
    for attempt in range(1, _TRIES + 1):
        found = await _once(runtime, tenant_id)
        if found.difference == 0 or attempt == _TRIES:
            return found
        await asyncio.sleep(_PAUSE_SECONDS)
    raise AssertionError("unreachable")


async def _once(runtime: Runtime, tenant_id: str | None) -> UsageReconciliation:
    since = utcnow() - _WINDOW
    # Verdicts first. A record that is decided between the two reads is then missing here, which the retry corrects; in
    # the other order it would look superfluous.
    async with _database(runtime, tenant_id).begin(tenant_id=tenant_id) as tx:
        verdicts = await _verdicts(tx, tenant_id, since)
    answers = await asyncio.gather(*(_ask(runtime, name, tenant_id, since) for name in USAGE_RECORDS.producers))
    produced = sum(answer.produced for answer in answers)
    missing = produced - sum(verdicts)
    waiting = 0
    if missing > 0:
        async with runtime.worker.begin() as tx:
            dead = await _dead_letters(tx, tenant_id, "failed", "waiting", "redriving")
        waiting = sum(answer.pending for answer in answers) + await _unread(runtime) + dead
    pending = max(0, min(missing, waiting))
    return UsageReconciliation(produced=produced, **verdicts._asdict(), pending=pending, difference=missing - pending)


def _database(runtime: Runtime, tenant_id: str | None) -> Database:
    return runtime.request if tenant_id else runtime.worker


async def _verdicts(tx: Tx, tenant_id: str | None, since: datetime) -> _Verdicts:
    # Billing makes the records of delivered messages itself; no producer's outbox has them.
    where = f"message_id >= uuid7_floor($2) AND ($1::text IS NULL OR tenant_id = $1) AND resource <> '{MESSAGE}'"
    [(counted, rejected, held, duplicate)] = await tx.sql(
        f"""
        SELECT count(*) FILTER (WHERE verdict = 'counted'), count(*) FILTER (WHERE verdict = 'rejected'),
        count(*) FILTER (WHERE verdict = 'held'),
        (SELECT count(*) FROM duplicate WHERE {where}) FROM usage WHERE {where}
        """,
        tenant_id,
        since,
    )
    # A record that could not be read and that an operator discarded counts as rejected.
    discarded = await _dead_letters(tx, tenant_id, "discarded")
    return _Verdicts(counted, rejected + discarded, held, duplicate)


async def _dead_letters(tx: Tx, tenant_id: str | None, *states: str) -> int:
    [(count,)] = await tx.sql(
        """
        SELECT count(DISTINCT message_id) FROM dead_letter WHERE consumer = $1 AND destination = $2
        AND state = ANY($3::text[]) AND ($4::text IS NULL OR key = $4) AND first_failed_at > $5
        """,
        _GROUP,
        USAGE_RECORDS.name,
        states,
        tenant_id,
        utcnow() - _WINDOW,
    )
    return int(count)


async def _ask(runtime: Runtime, service: str, tenant_id: str | None, since: datetime) -> ops_pb2.CountOutboxReply:
    target = addresses(runtime.settings.operations)[service]
    stub = ops_pb2_grpc.OperationsStub(runtime.channels.to(target, service, safe=_SAFE))
    request = ops_pb2.CountOutboxRequest(topic=USAGE_RECORDS.name)
    request.since.FromDatetime(since)
    try:
        return await stub.CountOutbox(request, metadata=rpc.tenant_metadata(tenant_id) if tenant_id else None)
    except Transient as error:
        raise Transient(f"could not read the number of produced records of {service}: {error}") from error


async def _unread(runtime: Runtime) -> int:
    """Returns the number of records of all tenants in the topic that billing has not read yet."""
    topic = runtime.settings.topic_prefix + USAGE_RECORDS.name
    consumer = AIOKafkaConsumer(**kafka_options(runtime.settings.kafka_bootstrap_servers.get_secret_value()))
    await consumer.start()
    try:
        ends: Mapping[TopicPartition, int] = await consumer.end_offsets(
            [TopicPartition(topic, n) for n in range(USAGE_RECORDS.partitions)]
        )
    finally:
        await consumer.stop()
    async with runtime.worker.begin() as tx:
        rows = await tx.sql(
            "SELECT partition, next_offset FROM consumer_offset WHERE consumer = $1 AND topic = $2",
            _GROUP,
            USAGE_RECORDS.name,
        )
    read = {partition: next_offset for partition, next_offset in rows}
    return sum(max(0, end - read.get(tp.partition, 0)) for tp, end in ends.items())
