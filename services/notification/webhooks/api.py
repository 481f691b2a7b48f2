"""HTTP API of webhook endpoints and of the log of their deliveries."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, InvalidMessage, NotFound, Transient
from infra.outgoing.client import Outgoing
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Paging, Reader, Writer, page
from infra.service.idempotency import ShownOnce, once
from infra.service.service import Runtime
from infra.web.times import Time
from services.notification.webhooks import endpoints
from services.notification.webhooks.endpoints import EndpointSecrets, new_secret
from services.notification.webhooks.events import EVENT_TYPES, EventType

# Of one tenant.
MAX_ENDPOINTS = 20
# By one call.
MAX_RESENT = 1_000
MAX_OVERLAP = timedelta(days=7)
_ENDPOINT = "id, url, events, disabled_reason, failing_since, created_at, updated_at"
_DELIVERY = "id, type, message_id, state, attempts, status, error, created_at, updated_at"

Events = Annotated[list[EventType], Field(min_length=1, max_length=len(EVENT_TYPES))]
Url = Annotated[str, Field(min_length=1, max_length=2_000)]


class NewEndpoint(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"url": "https://example.com/hooks", "events": ["run.completed"]}]},
    )

    url: Url
    events: Events


class EndpointChange(BaseModel):
    """The body of ``PATCH``. Absent fields stay as they are."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"enabled": True}]})

    url: Url | None = None
    events: Events | None = None
    enabled: bool | None = None
    """True also enables an endpoint that was disabled because it failed."""


class EndpointView(BaseModel):
    """An endpoint as the API shows it."""

    id: UUID
    url: str
    events: list[EventType]
    enabled: bool
    disabled_reason: str | None
    """Why nothing is sent to it; null if it is enabled."""
    failing_since: datetime | None
    """It has accepted nothing since then. After five days it is disabled. Null: its last answer was good."""
    created_at: datetime
    updated_at: datetime


def _prefix(secret: str) -> str:
    return secret[:10]


class CreatedEndpoint(EndpointView):
    secret: Annotated[str, ShownOnce(_prefix)]
    """``whsec_…``, with which the receiver verifies calls (Standard Webhooks). It is never shown again."""


class EndpointPage(BaseModel):
    items: list[EndpointView]
    next: str | None


class WebhookDeliveryView(BaseModel):
    """One event for one endpoint."""

    id: UUID
    type: EventType
    webhook_id: str
    """The header ``webhook-id``, the same at each attempt: the receiver drops repeats by it."""
    state: Literal["waiting", "delivered", "failed"]
    attempts: int
    status: int | None
    """The HTTP status of the last answer; null if there was none."""
    error: str | None
    created_at: datetime
    updated_at: datetime

    def cursor(self) -> str:
        return f"{self.created_at.isoformat()} {self.id}"


class WebhookDeliveryPage(BaseModel):
    items: list[WebhookDeliveryView]
    next: str | None


class Since(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"since": "2026-01-01T12:00:00Z"}]})

    since: Time


class Resent(BaseModel):
    resent: int
    next: datetime | None
    """The time from which the next call has to go on; null if there are no more."""


class Overlap(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"overlap_seconds": 86400}]})

    overlap_seconds: Annotated[int, Field(ge=0, le=int(MAX_OVERLAP.total_seconds()))] = 86_400
    """For this time, calls carry the signature of the old secret too."""


class NewSecret(BaseModel):
    secret: Annotated[str, ShownOnce(_prefix)]
    old_valid_until: datetime


def router(runtime: Runtime) -> APIRouter:
    router = APIRouter(prefix="/api/v1/webhook-endpoints", tags=["webhook endpoints"])
    secrets = EndpointSecrets(runtime.cipher)

    @router.post("", status_code=201, response_model=CreatedEndpoint)
    async def create_endpoint(body: NewEndpoint, who: Writer, request: Request) -> Response:
        """An address that gets the chosen events by Standard Webhooks.

        Failed calls are repeated after 5 s, 5 min, 30 min, 2 h, 5 h, 10 h and 10 h. An answer 410, or five days without
        an accepted call, disables the endpoint.
        """
        await _check(runtime.outgoing, body.url)

        async def work(tx: Tx) -> tuple[int, BaseModel]:
            # Two calls at once must not both become the last that is allowed.
            await tx.take_turn(f"webhook endpoints {who.tenant_id}")
            [(count,)] = await tx.sql("SELECT count(*) FROM webhook_endpoint")
            if count >= MAX_ENDPOINTS:
                raise Conflict(f"the tenant has {MAX_ENDPOINTS} endpoints, the most that it may have")
            id_, secret = uuid7(), new_secret()
            await tx.sql(
                """
                INSERT INTO webhook_endpoint (id, tenant_id, url, events, secret)
                VALUES ($1, $2, $3, $4, $5)
                """,
                id_,
                who.tenant_id,
                body.url,
                sorted(set(body.events)),
                secrets.seal(id_, secret),
            )
            audit(tx, who.actor, "webhook_endpoint.create", "webhook_endpoint", str(id_))
            return 201, CreatedEndpoint(**(await _get(tx, id_)).model_dump(), secret=secret)

        return await once(request, runtime, who, work)

    @router.get("")
    async def list_endpoints(who: Reader, paging: Paging) -> EndpointPage:
        """The endpoints of the tenant, oldest first."""
        after = _uuid(paging.after)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                f"SELECT {_ENDPOINT} FROM webhook_endpoint WHERE $1::uuid IS NULL OR id > $1 ORDER BY id LIMIT $2",
                after,
                paging.limit + 1,
            )
        return EndpointPage(**page([_endpoint(row) for row in rows], paging, key=lambda one: str(one.id)))

    @router.get("/{endpoint_id}")
    async def get_endpoint(endpoint_id: UUID, who: Reader) -> EndpointView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await _get(tx, endpoint_id)

    @router.patch("/{endpoint_id}")
    async def change_endpoint(endpoint_id: UUID, body: EndpointChange, who: Writer) -> EndpointView:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _get(tx, endpoint_id)
        if body.url is not None:
            await _check(runtime.outgoing, body.url)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await tx.sql(
                """
                UPDATE webhook_endpoint
                SET url = coalesce($2, url), events = coalesce($3, events),
                    disabled_reason = CASE WHEN $4 THEN NULL WHEN NOT $4 THEN 'on request' ELSE disabled_reason END,
                    failing_since = CASE WHEN $4 OR $2 <> url THEN NULL ELSE failing_since END,
                    updated_at = clock_timestamp()
                WHERE id = $1
                """,
                endpoint_id,
                body.url,
                sorted(set(body.events)) if body.events else None,
                body.enabled,
            )
            changed = ", ".join(sorted(body.model_dump(exclude_none=True)))
            audit(tx, who.actor, "webhook_endpoint.update", "webhook_endpoint", str(endpoint_id), changed=changed)
            return await _get(tx, endpoint_id)

    @router.delete("/{endpoint_id}", status_code=204)
    async def delete_endpoint(endpoint_id: UUID, who: Writer) -> None:
        """Deletes an endpoint with its log. Waiting events are not sent."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await tx.sql("DELETE FROM webhook_endpoint WHERE id = $1 RETURNING id", endpoint_id):
                raise NotFound("the tenant has no webhook endpoint with this id")
            audit(tx, who.actor, "webhook_endpoint.delete", "webhook_endpoint", str(endpoint_id))

    @router.get("/{endpoint_id}/deliveries")
    async def list_deliveries(
        endpoint_id: UUID,
        who: Reader,
        paging: Paging,
        state: Annotated[Literal["waiting", "delivered", "failed"] | None, Query()] = None,
    ) -> WebhookDeliveryPage:
        """The events for the endpoint in the last 30 days, newest first."""
        before = paging.after_time(UUID) or (None, None)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _get(tx, endpoint_id)
            rows = await tx.sql(
                f"""
                SELECT {_DELIVERY} FROM webhook_delivery
                WHERE endpoint_id = $1 AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::uuid))
                    AND ($4::text IS NULL OR state = $4)
                ORDER BY created_at DESC, id DESC
                LIMIT $5
                """,
                endpoint_id,
                *before,
                state,
                paging.limit + 1,
            )
        return WebhookDeliveryPage(**page([_delivery(row) for row in rows], paging, WebhookDeliveryView.cursor))

    @router.post("/{endpoint_id}/resend", status_code=202)
    async def resend(endpoint_id: UUID, body: Since, who: Writer) -> Resent:
        """Sends the endpoint's events since a time again, with the ids that they had; at most 1,000 by one call."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            endpoint = await _get(tx, endpoint_id)
            if not endpoint.enabled:
                raise Conflict(f"the endpoint is disabled: {endpoint.disabled_reason}; enable it first")
            rows = await tx.sql(
                """
                -- Locks the deliveries in the order of their ids.
                WITH chosen AS (
                    SELECT id, created_at FROM webhook_delivery
                    WHERE endpoint_id = $1 AND created_at >= $2 AND state <> 'waiting'
                    ORDER BY created_at, id
                    LIMIT $3
                ), locked AS MATERIALIZED (
                    SELECT d.id FROM webhook_delivery d JOIN chosen USING (id) ORDER BY d.id FOR UPDATE OF d
                )
                UPDATE webhook_delivery d
                SET state = 'waiting', attempts = 0, status = NULL, error = NULL, updated_at = clock_timestamp()
                FROM locked WHERE d.id = locked.id
                RETURNING d.id, d.created_at
                """,
                endpoint_id,
                body.since,
                MAX_RESENT,
            )
            for id_, _ in rows:
                endpoints.enqueue(tx, UUID(str(id_)))
            audit(tx, who.actor, "webhook_endpoint.resend", "webhook_endpoint", str(endpoint_id), resent=str(len(rows)))
        return Resent(resent=len(rows), next=max(at for _, at in rows) if len(rows) == MAX_RESENT else None)

    @router.post("/{endpoint_id}/rotate-secret", response_model=NewSecret)
    async def rotate_secret(endpoint_id: UUID, who: Writer, request: Request, body: Overlap | None = None) -> Response:
        """Makes a new secret. During the overlap, calls carry two signatures: of the new and of the old one."""
        until = utcnow() + timedelta(seconds=(body or Overlap()).overlap_seconds)

        async def work(tx: Tx) -> tuple[int, BaseModel]:
            secret = new_secret()
            changed = await tx.sql(
                """
                UPDATE webhook_endpoint
                SET old_secret = secret, old_until = $3, secret = $2, updated_at = clock_timestamp()
                WHERE id = $1
                RETURNING id
                """,
                endpoint_id,
                secrets.seal(endpoint_id, secret),
                until,
            )
            if not changed:
                raise NotFound("the tenant has no webhook endpoint with this id")
            audit(tx, who.actor, "webhook_endpoint.rotate_secret", "webhook_endpoint", str(endpoint_id))
            return 200, NewSecret(secret=secret, old_valid_until=until)

        return await once(request, runtime, who, work)

    return router


async def _check(outgoing: Outgoing, url: str) -> None:
    try:
        await outgoing.check(url)
    except Transient as error:
        raise InvalidMessage("url", str(error)) from error


async def _get(tx: Tx, endpoint_id: UUID) -> EndpointView:
    rows = await tx.sql(f"SELECT {_ENDPOINT} FROM webhook_endpoint WHERE id = $1", endpoint_id)
    if not rows:
        raise NotFound("the tenant has no webhook endpoint with this id")
    return _endpoint(rows[0])


def _endpoint(row: tuple[Any, ...]) -> EndpointView:
    id_, url, events, disabled_reason, failing_since, created_at, updated_at = row
    return EndpointView(
        id=id_,
        url=url,
        events=events,
        enabled=disabled_reason is None,
        disabled_reason=disabled_reason,
        failing_since=failing_since,
        created_at=created_at,
        updated_at=updated_at,
    )


def _delivery(row: tuple[Any, ...]) -> WebhookDeliveryView:
    id_, type_, message_id, state, attempts, status, error, created_at, updated_at = row
    return WebhookDeliveryView(
        id=id_,
        type=type_,
        webhook_id=f"msg_{message_id}",
        state=state,
        attempts=attempts,
        status=status,
        error=error,
        created_at=created_at,
        updated_at=updated_at,
    )


def _uuid(cursor: str | None) -> UUID | None:
    try:
        return None if cursor is None else UUID(cursor)
    except ValueError:
        raise InvalidMessage("cursor", "is not a valid cursor") from None
