"""Operations that every process serves by gRPC: dead letters and the outbox of its own schema."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace

from infra.errors import InvalidMessage, NotFound
from infra.postgres import dead_letters
from infra.postgres.database import Database
from infra.postgres.db import sql
from infra.postgres.dead_letters import DeadLetterView
from infra.service import bulk_redrive, redrive
from infra.web import rpc
from infra.web.health import Health
from protos.ops.v1 import ops_pb2, ops_pb2_grpc

MAX_LISTED = 1000


class Operations(ops_pb2_grpc.OperationsServicer):
    """The servicer; ``protos/ops/v1/ops.proto`` documents its methods."""

    def __init__(self, database: Database, health: Health) -> None:
        self._database = database
        self._health = health

    async def ListDeadLetters(
        self, request: ops_pb2.ListDeadLettersRequest, context: Any
    ) -> ops_pb2.ListDeadLettersReply:
        async with self._database.engine.statements() as connection:
            letters = await dead_letters.list_dead_letters(
                connection,
                self._database.service,
                limit=_limit(request.limit),
                after=_uuid("after", request.after) if request.HasField("after") else None,
                tenant_id=rpc.tenant_if_any(),
            )
        return ops_pb2.ListDeadLettersReply(items=[_shown(letter, whole=False) for letter in letters])

    async def GroupDeadLetters(
        self, request: ops_pb2.ListDeadLettersRequest, context: Any
    ) -> ops_pb2.GroupDeadLettersReply:
        async with self._database.begin() as tx:
            groups = await bulk_redrive.group_by_cause(
                tx,
                limit=_limit(request.limit),
                after=_uuid("after", request.after) if request.HasField("after") else None,
                tenant_id=rpc.tenant_if_any(),
            )
        return ops_pb2.GroupDeadLettersReply(items=map(_shown_group, groups))

    async def GetDeadLetter(self, request: ops_pb2.GetDeadLetterRequest, context: Any) -> ops_pb2.DeadLetter:
        letter = await self._own(_uuid("id", request.id))
        async with self._database.begin() as tx:
            payload = await dead_letters.read_payload(await tx.connection(), letter.id, self._database.sealing)
        return _shown(replace(letter, payload=payload), whole=True)

    async def RedriveDeadLetters(
        self, request: ops_pb2.RedriveDeadLettersRequest, context: Any
    ) -> ops_pb2.RedriveDeadLettersReply:
        ids = [(await self._own(_uuid("ids", id_))).id for id_ in request.ids] or await self._failed()
        async with self._database.begin(tenant_id=rpc.tenant_if_any()) as tx:
            count = await redrive.request_redrive(tx, ids, actor=_actor(request.actor), force=request.force)
        return ops_pb2.RedriveDeadLettersReply(redriven=count)

    async def RedriveMatching(
        self, request: ops_pb2.RedriveMatchingRequest, context: Any
    ) -> ops_pb2.RedriveMatchingReply:
        tenant_id = rpc.tenant_if_any()
        async with self._database.begin(tenant_id=tenant_id) as tx:
            redriven = await bulk_redrive.redrive_matching(
                tx,
                actor=_actor(request.actor),
                ids=[_uuid("ids", id_) for id_ in request.ids] or None,
                cause=request.cause if request.HasField("cause") else None,
                tenant_id=tenant_id,
                rate_per_s=request.rate_per_s if request.HasField("rate_per_s") else None,
                dry_run=request.dry_run,
                force=request.force,
            )
        return ops_pb2.RedriveMatchingReply(**redriven._asdict())

    async def DiscardDeadLetter(
        self, request: ops_pb2.DiscardDeadLetterRequest, context: Any
    ) -> ops_pb2.DiscardDeadLetterReply:
        letter = await self._own(_uuid("id", request.id))
        async with self._database.begin(tenant_id=rpc.tenant_if_any()) as tx:
            await redrive.discard(tx, letter.id, actor=_actor(request.actor))
        return ops_pb2.DiscardDeadLetterReply()

    async def CheckHealth(self, request: ops_pb2.CheckHealthRequest, context: Any) -> ops_pb2.CheckHealthReply:
        ready, body = await self._health.ready()
        return ops_pb2.CheckHealthReply(
            ready=ready,
            version=body["version"],
            uptime_s=body["uptime"],
            dependencies=[
                ops_pb2.Dependency(name=name, up=found["status"] == "up", latency_ms=found["latency"])
                for name, found in body["dependencies"].items()
            ],
        )

    async def CountOutbox(self, request: ops_pb2.CountOutboxRequest, context: Any) -> ops_pb2.CountOutboxReply:
        async with self._database.engine.statements() as connection:
            [(produced, published)] = await sql(
                connection,
                """
                -- A message has one row, however often it was sent: resend marks rows and does not add any. On a topic
                -- that is keyed by tenant, the key finds a tenant's rows.
                SELECT count(DISTINCT message_id), count(DISTINCT message_id) FILTER (WHERE published_at IS NOT NULL)
                FROM outbox
                WHERE bus = 'kafka' AND destination = $1
                  AND ($2::text IS NULL OR key = $2)
                  AND ($3::timestamptz IS NULL OR message_id >= uuid7_floor($3))
                """,
                request.topic,
                rpc.tenant_if_any(),
                _time(request.since) if request.HasField("since") else None,
            )
        return ops_pb2.CountOutboxReply(produced=produced, published=published, pending=produced - published)

    async def _own(self, id_: UUID) -> DeadLetterView:
        async with self._database.engine.statements() as connection:
            letter = await dead_letters.get_dead_letter(connection, self._database.service, id_)
        tenant_id = rpc.tenant_if_any()
        if letter is None or (tenant_id and letter.tenant_id != tenant_id):
            raise NotFound(f"dead letter {id_}: does not exist")
        return letter

    async def _failed(self) -> list[UUID]:
        async with self._database.engine.statements() as connection:
            letters = await dead_letters.list_dead_letters(
                connection, self._database.service, limit=MAX_LISTED, tenant_id=rpc.tenant_if_any()
            )
        return [letter.id for letter in letters if letter.state == "failed"]


def servicer(database: Database, health: Health) -> tuple[Callable[[Any, Any], None], Operations]:
    return ops_pb2_grpc.add_OperationsServicer_to_server, Operations(database, health)


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidMessage(field, "must be a UUID") from None


def _limit(asked: int) -> int:
    if asked < 0:
        raise InvalidMessage("limit", "must not be negative")
    return min(asked or 100, MAX_LISTED)


def _time(asked: Timestamp) -> datetime:
    try:
        at: datetime = asked.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidMessage("since", "must be a time from 1970 to 9999") from None
    if at.year < 1970:
        raise InvalidMessage("since", "must be a time from 1970 to 9999")
    return at


def _actor(asked: str) -> str:
    """The accountable actor: the one that the calling service names, otherwise that service."""
    return asked or f"service:{rpc.caller()}"


def _shown(letter: DeadLetterView, *, whole: bool) -> ops_pb2.DeadLetter:
    shown = ops_pb2.DeadLetter(
        id=str(letter.id),
        service=letter.service,
        consumer=letter.consumer,
        source=letter.source,
        place=letter.place,
        message_id=letter.message_id,
        key=letter.key,
        tenant_id=letter.tenant_id,
        state=letter.state,
        attempts=letter.attempts,
        error=letter.error,
        headers=letter.headers if whole else {},
        payload=letter.payload if whole else "",
    )
    shown.first_failed_at.FromDatetime(letter.first_failed_at)
    shown.last_failed_at.FromDatetime(letter.last_failed_at)
    return shown


def _shown_group(group: bulk_redrive.DeadLetterGroup) -> ops_pb2.DeadLetterGroup:
    fields = group._asdict() | {"first_id": str(group.first_id)}
    return ops_pb2.DeadLetterGroup(**fields)
