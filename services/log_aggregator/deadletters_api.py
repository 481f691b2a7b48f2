"""HTTP of the dead letters of all services."""

from __future__ import annotations

from typing import Any, Literal
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.reads import record_reads
from infra.service.api import Editor, Paging, Viewer, page
from infra.service.service import Runtime
from protos.ops.v1 import ops_pb2
from services.log_aggregator.deadletters import BulkRedrive, BulkRedriveResult, DeadLetters, ListedDeadLetter, shown
from services.log_aggregator.operations_clients import metadata


class Redrive(BaseModel):
    """Options of a redrive."""

    model_config = ConfigDict(extra="forbid")
    force: bool = False
    """Also redrive a message that is older than the inbox, so that a repeat of it could not be detected."""


def router(runtime: Runtime) -> APIRouter:
    services = DeadLetters(runtime)
    routes = APIRouter(tags=["dead letters"])

    @routes.get("/api/v1/deadletters")
    async def list_dead_letters(
        who: Viewer, paging: Paging, group_by: Literal["cause"] | None = None
    ) -> dict[str, Any]:
        """Lists the open dead letters by service, oldest first; with `group_by` as groups with the same cause.

        `unavailable`: services that do not answer now.
        """
        if group_by:
            groups, unavailable = await services.grouped(who, paging.after, paging.limit + 1)
            return page(groups, paging, lambda group: f"{group.service} {group.first_id}") | {
                "unavailable": unavailable
            }
        found, unavailable = await services.listed(who, paging.after, paging.limit + 1)
        return page(found, paging, lambda letter: f"{letter.service} {letter.id}") | {"unavailable": unavailable}

    @routes.post("/api/v1/deadletters/redrive", status_code=202)
    async def redrive_matching(who: Editor, body: BulkRedrive) -> BulkRedriveResult:
        """Lets the services process all failed dead letters that match, and then those that wait behind them."""
        if (body.ids is None) == (body.cause is None and body.service is None):
            raise InvalidMessage("ids", "must be given, or else cause, service or both")
        return await services.redriven(who, body)

    @routes.get("/api/v1/deadletters/{id}")
    async def get_dead_letter(id: UUID, who: Viewer) -> ListedDeadLetter:
        _, letter = await services.find(who, id)

        async def work(tx: Tx) -> None:
            # The payload may contain people's text.
            await record_reads(tx, who, "dead_letter", [str(id)], service=letter.service)

        database = runtime.request if who.tenant_id else runtime.worker
        await database.run(work, tenant_id=who.tenant_id or None)
        return letter

    @routes.post("/api/v1/deadletters/{id}/redrive", status_code=202)
    async def redrive(id: UUID, who: Editor, body: Redrive | None = None) -> ListedDeadLetter:
        """Lets the service process the message again as soon as it can."""
        service, _ = await services.find(who, id)
        request = ops_pb2.RedriveDeadLettersRequest(ids=[str(id)], actor=who.actor, force=bool(body and body.force))
        await service.RedriveDeadLetters(request, metadata=metadata(who))
        return shown(await service.GetDeadLetter(ops_pb2.GetDeadLetterRequest(id=str(id)), metadata=metadata(who)))

    @routes.delete("/api/v1/deadletters/{id}", status_code=204)
    async def discard(id: UUID, who: Editor) -> None:
        """Discards the message. The messages that wait behind it continue."""
        service, _ = await services.find(who, id)
        request = ops_pb2.DiscardDeadLetterRequest(id=str(id), actor=who.actor)
        await service.DiscardDeadLetter(request, metadata=metadata(who))

    return routes
