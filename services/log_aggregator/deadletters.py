"""The dead letters of all services. Each service is asked for its own by gRPC."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InvalidMessage, NotFound, Transient
from infra.security.auth import Identity
from infra.service.service import Runtime
from protos.ops.v1 import ops_pb2
from services.log_aggregator.operations_clients import Method, OperationsClients, metadata

_PLAIN = ("id", "service", "consumer", "source", "message_id", "state", "attempts", "error")
_PLAIN_OF_GROUP = ("first_id", "consumer", "source", "cause", "failed", "waiting", "redriving")


class ListedDeadLetter(BaseModel):
    """A message that a service could not process."""

    id: str
    service: str
    consumer: str
    source: str
    """``kafka:<topic>``, ``rabbit:<queue>``, ``outbox:<destination>`` or ``lane:…``."""
    message_id: str
    key: str | None
    tenant_id: str | None
    state: str
    """failed, waiting (behind a failed message with the same key), redriving, redriven or discarded."""
    attempts: int
    error: str
    first_failed_at: datetime
    last_failed_at: datetime
    headers: dict[str, str] | None = None
    """Not in lists."""
    payload: str | None = None
    """Not in lists."""


class ListedDeadLetterGroup(BaseModel):
    """The open dead letters of one consumer and source with the same cause."""

    service: str
    consumer: str
    source: str
    cause: str
    """The first line of the error; ids and numbers are ``#``."""
    failed: int
    waiting: int
    redriving: int
    first_failed_at: datetime
    last_failed_at: datetime
    first_id: str
    """The oldest one of them."""


class BulkRedrive(BaseModel):
    """Which failed dead letters are redriven: `ids`, or those of a `cause`, a `service`, or both."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"cause": "TimeoutError: after # s"}})
    cause: str | None = Field(None, max_length=500)
    """As ``GET /api/v1/deadletters?group_by=cause`` shows it."""
    service: str | None = Field(None, max_length=100)
    ids: list[UUID] | None = Field(None, min_length=1, max_length=1000)
    rate_per_s: float | None = Field(None, gt=0, le=1000)
    """How many of them each service handles in a second, on average. Default: as many as it can."""
    dry_run: bool = False
    """Only counts."""
    force: bool = False
    """Also redrive messages that are older than the inbox, so that a repeat of them could not be detected."""


class Count(BaseModel):
    """The result of a bulk redrive in one service."""

    service: str
    matched: int
    """Failed dead letters that match."""
    redriven: int
    """Those that are marked, or would be: at most 10,000. A further call marks the rest."""
    too_old: int
    """Those that are left, because a repeat could not be detected."""


class BulkRedriveResult(BaseModel):
    dry_run: bool
    matched: int
    redriven: int
    services: list[Count]
    unavailable: list[str]
    """Services that do not answer now."""


class DeadLetters:
    """Asks each service for its own dead letters."""

    def __init__(self, runtime: Runtime) -> None:
        self._services = OperationsClients(runtime)

    async def listed(self, who: Identity, after: str | None, limit: int) -> tuple[list[ListedDeadLetter], list[str]]:
        """Returns up to `limit` letters after the position `after` (``service id``), and the silent services."""
        replies, unavailable = await self._pages(who, after, limit, lambda stub: stub.ListDeadLetters)
        return [shown(letter) for _, reply in replies for letter in reply.items][:limit], unavailable

    async def grouped(
        self, who: Identity, after: str | None, limit: int
    ) -> tuple[list[ListedDeadLetterGroup], list[str]]:
        """Returns up to `limit` groups after the position `after` (``service id``), and the silent services."""
        replies, unavailable = await self._pages(who, after, limit, lambda stub: stub.GroupDeadLetters)
        return [_shown_group(name, group) for name, reply in replies for group in reply.items][:limit], unavailable

    async def redriven(self, who: Identity, wanted: BulkRedrive) -> BulkRedriveResult:
        """Marks the letters that match in all services, or in one.

        Raises InvalidMessage for an unknown service, and Transient if a service that was named does not answer. Raises
        NotFound if one of `ids` is not a failed dead letter; then nothing is changed.
        """
        if wanted.service is not None and wanted.service not in self._services.stubs:
            raise InvalidMessage("service", f"must be one of {', '.join(self._services.stubs)}")
        names = [wanted.service] if wanted.service else list(self._services.stubs)
        ids = sorted({str(id_) for id_ in wanted.ids or ()})
        request = ops_pb2.RedriveMatchingRequest(
            ids=ids,
            cause=wanted.cause,
            rate_per_s=wanted.rate_per_s,
            dry_run=wanted.dry_run or bool(ids),
            force=wanted.force,
            actor=who.actor,
        )
        replies, unavailable = await self._services.ask(
            who, dict.fromkeys(names, request), lambda stub: stub.RedriveMatching
        )
        if wanted.service and unavailable:
            raise Transient(f"{wanted.service} does not answer")
        if ids:
            if sum(reply.matched for _, reply in replies) < len(ids):
                if unavailable:
                    raise Transient(f"ids: not all found, but {', '.join(unavailable)} did not answer")
                raise NotFound("ids: one is not a failed dead letter")
            if not wanted.dry_run:
                request.dry_run = False
                holders = [name for name, reply in replies if reply.matched]
                replies, silent = await self._services.ask(
                    who, dict.fromkeys(holders, request), lambda stub: stub.RedriveMatching
                )
                unavailable = sorted({*unavailable, *silent})
        counts = [
            Count(service=name, matched=reply.matched, redriven=reply.redriven, too_old=reply.too_old)
            for name, reply in replies
            if reply.matched
        ]
        return BulkRedriveResult(
            dry_run=wanted.dry_run,
            matched=sum(count.matched for count in counts),
            redriven=sum(count.redriven for count in counts),
            services=counts,
            unavailable=unavailable,
        )

    async def _pages(
        self, who: Identity, after: str | None, limit: int, method: Method
    ) -> tuple[list[tuple[str, Any]], list[str]]:
        first, _, id_ = (after or "").partition(" ")
        if after and (first not in self._services.stubs or not _is_uuid(id_)):
            raise InvalidMessage("cursor", "is not a valid cursor")
        requests = {
            name: ops_pb2.ListDeadLettersRequest(limit=limit, after=id_ if name == first and id_ else None)
            for name in self._services.stubs
            if name >= first
        }
        return await self._services.ask(who, requests, method)

    async def find(self, who: Identity, id_: UUID) -> tuple[Any, ListedDeadLetter]:
        """Returns the client of the service that has the letter, and the letter.

        Raises NotFound if no service has it, and Transient if a service that may have it does not answer.
        """
        request = ops_pb2.GetDeadLetterRequest(id=str(id_))
        replies = await asyncio.gather(
            *(stub.GetDeadLetter(request, metadata=metadata(who)) for stub in self._services.stubs.values()),
            return_exceptions=True,
        )
        away = []
        for name, reply in zip(self._services.stubs, replies, strict=True):
            if isinstance(reply, ops_pb2.DeadLetter):
                return self._services.stubs[name], shown(reply, whole=True)
            if isinstance(reply, Transient):
                away.append(name)
            elif not isinstance(reply, NotFound):
                raise reply
        if away:
            raise Transient(f"dead letter {id_}: not found, but {', '.join(away)} did not answer")
        raise NotFound(f"dead letter {id_}: not found")


def shown(letter: ops_pb2.DeadLetter, *, whole: bool = False) -> ListedDeadLetter:
    return ListedDeadLetter(
        **{name: getattr(letter, name) for name in _PLAIN},
        key=letter.key if letter.HasField("key") else None,
        tenant_id=letter.tenant_id if letter.HasField("tenant_id") else None,
        first_failed_at=letter.first_failed_at.ToDatetime(UTC),
        last_failed_at=letter.last_failed_at.ToDatetime(UTC),
        headers=dict(letter.headers) if whole else None,
        payload=letter.payload if whole else None,
    )


def _shown_group(service: str, group: ops_pb2.DeadLetterGroup) -> ListedDeadLetterGroup:
    return ListedDeadLetterGroup(
        service=service,
        **{name: getattr(group, name) for name in _PLAIN_OF_GROUP},
        first_failed_at=group.first_failed_at.ToDatetime(UTC),
        last_failed_at=group.last_failed_at.ToDatetime(UTC),
    )


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
