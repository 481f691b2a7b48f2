"""HTTP of the dead letters of all services. Each service is asked for its own by gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from infra.errors import InvalidMessage, NotFound, Transient
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Editor, Paging, Viewer, page
from infra.service.service import Runtime
from infra.web import rpc
from protos.ops.v1 import ops_pb2, ops_pb2_grpc
from services.log_aggregator.settings import operations

_SAFE = ["clawbus.ops.v1.Operations/ListDeadLetters", "clawbus.ops.v1.Operations/GetDeadLetter"]
_PLAIN = ("id", "service", "consumer", "source", "message_id", "state", "attempts", "error")


class DeadLetter(BaseModel):
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


class Redrive(BaseModel):
    """Options of a redrive."""

    model_config = ConfigDict(extra="forbid")
    force: bool = False
    """Also redrive a message that is older than the inbox, so that a repeat of it could not be detected."""


def router(runtime: Runtime) -> APIRouter:
    services = _Services(runtime)
    routes = APIRouter(tags=["dead letters"])

    @routes.get("/api/v1/deadletters")
    async def list_dead_letters(who: Viewer, paging: Paging) -> dict[str, Any]:
        """Lists the open dead letters by service, oldest first. `unavailable`: services that do not answer now."""
        found, unavailable = await services.listed(who, paging.after, paging.limit + 1)
        return page(found, paging, lambda letter: f"{letter.service} {letter.id}") | {"unavailable": unavailable}

    @routes.get("/api/v1/deadletters/{id}")
    async def get_dead_letter(id: UUID, who: Viewer) -> DeadLetter:
        _, letter = await services.find(who, id)

        async def work(tx: Tx) -> None:
            # The payload may contain people's text.
            audit(tx, who.actor, "dead_letter.read", "dead_letter", str(id), service=letter.service)

        database = runtime.request if who.tenant_id else runtime.worker
        await database.run(work, tenant_id=who.tenant_id or None)
        return letter

    @routes.post("/api/v1/deadletters/{id}/redrive", status_code=202)
    async def redrive(id: UUID, who: Editor, body: Redrive | None = None) -> DeadLetter:
        """Lets the service process the message again as soon as it can."""
        service, _ = await services.find(who, id)
        request = ops_pb2.RedriveDeadLettersRequest(ids=[str(id)], actor=who.actor, force=bool(body and body.force))
        await service.RedriveDeadLetters(request, metadata=_metadata(who))
        return _shown(await service.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id=str(id)), metadata=_metadata(who)))

    @routes.delete("/api/v1/deadletters/{id}", status_code=204)
    async def discard(id: UUID, who: Editor) -> None:
        """Discards the message. The messages that wait behind it continue."""
        service, _ = await services.find(who, id)
        request = ops_pb2.DiscardDeadLetterRequest(id=str(id), actor=who.actor)
        await service.DiscardDeadLetter(request, metadata=_metadata(who))

    return routes


class _Services:
    def __init__(self, runtime: Runtime) -> None:
        self._stubs: Mapping[str, ops_pb2_grpc.OperationsStub] = {
            name: ops_pb2_grpc.OperationsStub(runtime.channels.to(target, name, safe=_SAFE))
            for name, target in sorted(operations(runtime.settings.operations).items())
        }

    async def listed(self, who: Identity, after: str | None, limit: int) -> tuple[list[DeadLetter], list[str]]:
        """Returns up to `limit` letters after the position `after` (``service id``), and the silent services."""
        first, _, id_ = (after or "").partition(" ")
        if after and (first not in self._stubs or not _is_uuid(id_)):
            raise InvalidMessage("cursor", "is not a valid cursor")
        names = [name for name in self._stubs if name >= first]
        requests = [
            ops_pb2.ListDeadLettersRequest(limit=limit, after=id_ if name == first and id_ else None) for name in names
        ]
        replies = await asyncio.gather(
            *(
                self._stubs[name].ListDeadLetters(request, metadata=_metadata(who))
                for name, request in zip(names, requests, strict=True)
            ),
            return_exceptions=True,
        )
        letters: list[DeadLetter] = []
        unavailable: list[str] = []
        for name, reply in zip(names, replies, strict=True):
            if isinstance(reply, Transient):
                unavailable.append(name)
            elif isinstance(reply, BaseException):
                raise reply
            else:
                letters += map(_shown, reply.items)
        return letters[:limit], unavailable

    async def find(self, who: Identity, id_: UUID) -> tuple[Any, DeadLetter]:
        """Returns the client of the service that has the letter, and the letter.

        Raises NotFound if no service has it, and Transient if a service that may have it does not answer.
        """
        request = ops_pb2.GetDeadLetterRequest(id=str(id_))
        replies = await asyncio.gather(
            *(stub.GetDeadLetter(request, metadata=_metadata(who)) for stub in self._stubs.values()),
            return_exceptions=True,
        )
        away = []
        for name, reply in zip(self._stubs, replies, strict=True):
            if isinstance(reply, ops_pb2.DeadLetter):
                return self._stubs[name], _shown(reply, whole=True)
            if isinstance(reply, Transient):
                away.append(name)
            elif not isinstance(reply, NotFound):
                raise reply
        if away:
            raise Transient(f"dead letter {id_}: not found, but {', '.join(away)} did not answer")
        raise NotFound(f"dead letter {id_}: not found")


def _metadata(who: Identity) -> Any:
    return rpc.tenant_metadata(who.tenant_id) if who.tenant_id else None


def _shown(letter: ops_pb2.DeadLetter, *, whole: bool = False) -> DeadLetter:
    return DeadLetter(
        **{name: getattr(letter, name) for name in _PLAIN},
        key=letter.key if letter.HasField("key") else None,
        tenant_id=letter.tenant_id if letter.HasField("tenant_id") else None,
        first_failed_at=letter.first_failed_at.ToDatetime(UTC),
        last_failed_at=letter.last_failed_at.ToDatetime(UTC),
        headers=dict(letter.headers) if whole else None,
        payload=letter.payload if whole else None,
    )


def _is_uuid(text: str) -> bool:
    try:
        UUID(text)
    except ValueError:
        return False
    return True
