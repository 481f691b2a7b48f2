"""HTTP API of a channel's connection to its vendor: test, registration, rotation of credentials, pause, health."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import datetime, timedelta
from typing import Annotated, Literal, TypeVar
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow
from infra.errors import Conflict, EffectFailed, InvalidMessage, NotFound, TooLarge, Transient, Unanswered
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Reader, Writer
from infra.service.service import Runtime
from infra.stores.cache import Cache
from services.channel import history
from services.channel.accounts import store as stored
from services.channel.accounts.channels import Channel, Credentials, checked_credentials, get, vendor_of
from services.channel.accounts.store import Accounts, AccountSecrets, ChannelAccount

T = TypeVar("T")

MAX_OVERLAP = timedelta(days=7)
# Each test is a call to the vendor.
TESTS_PER_MINUTE = 10
# The error rate is that of this many of the newest deliveries that have ended.
RECENT_DELIVERIES = 100


class Tested(BaseModel):
    """The result of a real call with the channel's credentials."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"ok": True, "identity": "@support_bot", "error": None}]})

    ok: bool
    identity: str | None
    """The account's name at the vendor; null if the call failed."""
    error: str | None


class Registered(BaseModel):
    """The result of telling the vendor the address of the webhook."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"ok": True, "url": "https://claw.example/webhooks/telegram/x", "error": None}]}
    )

    ok: bool
    url: str
    """The address that the vendor was told."""
    error: str | None


class Rotation(BaseModel):
    """New credentials for a channel."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"credentials": {"bot_token": "1:new", "secret_token": "new"}, "overlap_seconds": 600}]
        },
    )

    credentials: Credentials
    overlap_seconds: Annotated[int, Field(ge=0, le=int(MAX_OVERLAP.total_seconds()))] = 0
    """For this time, calls of the vendor that the old credentials prove are accepted too."""


class ConnectionHealth(BaseModel):
    """Whether a channel works."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "state": "ok",
                    "last_event_at": "2026-01-01T12:00:00Z",
                    "last_delivery_at": "2026-01-01T12:00:04Z",
                    "error_rate": 0.02,
                    "last_error": "400: chat not found",
                }
            ]
        }
    )

    state: Literal["ok", "paused", "broken"]
    """``broken``: the vendor refuses the account."""
    last_event_at: datetime | None
    """When a person last wrote."""
    last_delivery_at: datetime | None
    """When the vendor last accepted a message."""
    error_rate: float
    """The share of failed and unconfirmed deliveries among the last 100 that have ended, from 0 to 1."""
    last_error: str | None
    """Why the account is broken, or else the reason of the newest failed delivery among these 100."""


def router(runtime: Runtime, secrets: AccountSecrets, accounts: Accounts) -> APIRouter:
    router = APIRouter(prefix="/api/v1/channels", tags=["channels"])
    cache = Cache(runtime.cache)

    async def account_of(channel_id: UUID, who: Identity) -> ChannelAccount:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            account = await stored.read(tx, secrets, channel_id)
        if account is None:
            raise NotFound("the tenant has no channel with this id")
        await cache.limit(str(channel_id), "channel test", times=TESTS_PER_MINUTE, seconds=60)
        return account

    async def enable(channel_id: UUID, who: Identity, *, enabled: bool) -> Channel:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await tx.sql(
                """
                UPDATE account
                SET enabled = $2, broken_reason = CASE WHEN $2 THEN NULL ELSE broken_reason END,
                    updated_at = clock_timestamp()
                WHERE id = $1
                """,
                channel_id,
                enabled,
            )
            channel = await get(tx, secrets, channel_id)
            audit(tx, who.actor, f"channel.{'resume' if enabled else 'pause'}", "channel", str(channel_id))
        accounts.forget(channel_id)
        return channel

    @router.post("/{channel_id}/test")
    async def test_channel(channel_id: UUID, who: Writer) -> Tested:
        """Makes a call with the channel's credentials that changes nothing at the vendor.

        A channel of type ``webhook`` sends a signed ``{"type": "test"}`` to its ``reply_url``.
        """
        account = await account_of(channel_id, who)
        identity, error = await _attempt(account.vendor.identify(runtime.outgoing, account.origin, account.credentials))
        if identity is not None:
            async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
                await stored.keep_identity(tx, secrets, account, identity)
            accounts.forget(channel_id)
        return Tested(ok=error is None, identity=identity, error=error)

    @router.post("/{channel_id}/register")
    async def register_channel(channel_id: UUID, who: Writer) -> Registered:
        """Tells the vendor to call this channel's webhook. 409 if the vendor has no call for that."""
        account = await account_of(channel_id, who)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            channel = await get(tx, secrets, channel_id)
            audit(tx, who.actor, "channel.register", "channel", str(channel_id))
        url = runtime.settings.public_url.rstrip("/") + channel.webhook_path
        done, error = await _attempt(
            account.vendor.register(runtime.outgoing, account.origin, account.credentials, url)
        )
        if done is False:
            steps = " ".join(account.vendor.steps)
            raise Conflict(f"{account.vendor.name} has no call for this; enter {url} in its console: {steps}")
        return Registered(ok=error is None, url=url, error=error)

    @router.post("/{channel_id}/rotate")
    async def rotate_credentials(channel_id: UUID, body: Rotation, who: Writer) -> Channel:
        """Replaces the credentials; repairs a broken channel. Messages are sent with the new ones at once."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            before = await get(tx, secrets, channel_id)
        credentials = await checked_credentials(runtime.outgoing, vendor_of(before.type), body.credentials)
        until = utcnow() + timedelta(seconds=body.overlap_seconds) if body.overlap_seconds else None
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await tx.sql(
                """
                UPDATE account
                SET old_credentials = CASE WHEN $3::timestamptz IS NULL THEN NULL ELSE credentials END,
                    old_until = $3, credentials = $2, identity = NULL, broken_reason = NULL,
                    updated_at = clock_timestamp()
                WHERE id = $1
                """,
                channel_id,
                secrets.seal(channel_id, "credentials", credentials),
                until,
            )
            channel = await get(tx, secrets, channel_id)
            overlap = str(body.overlap_seconds)
            audit(tx, who.actor, "channel.rotate", "channel", str(channel_id), overlap_seconds=overlap)
        accounts.forget(channel_id)
        return channel

    @router.post("/{channel_id}/pause")
    async def pause_channel(channel_id: UUID, who: Writer) -> Channel:
        """Messages that arrive meanwhile are answered 200 and ignored. Replies wait, for at most a day."""
        return await enable(channel_id, who, enabled=False)

    @router.post("/{channel_id}/resume")
    async def resume_channel(channel_id: UUID, who: Writer) -> Channel:
        """Ends a pause; repairs a broken channel. Replies that waited are sent within seconds."""
        return await enable(channel_id, who, enabled=True)

    @router.get("/{channel_id}/health")
    async def channel_health(channel_id: UUID, who: Reader) -> ConnectionHealth:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            channel = await get(tx, secrets, channel_id)
            last = await tx.sql(
                f"""
                SELECT recorded_at FROM event WHERE type = 'MessageTaken' AND {history.CHANNEL} = $1
                ORDER BY recorded_at DESC
                LIMIT 1
                """,
                str(channel_id).encode(),
            )
            recent = await tx.sql(
                """
                SELECT state, reason, updated_at FROM delivery
                WHERE channel_id = $1 AND state <> 'queued'
                ORDER BY created_at DESC
                LIMIT $2
                """,
                channel_id,
                RECENT_DELIVERIES,
            )
        errors = [reason for state, reason, _ in recent if state in ("failed", "unknown")]
        return ConnectionHealth(
            state="broken" if channel.broken_reason else "ok" if channel.enabled else "paused",
            last_event_at=last[0][0] if last else None,
            last_delivery_at=max((at for state, _, at in recent if state not in ("failed", "unknown")), default=None),
            error_rate=len(errors) / len(recent) if recent else 0.0,
            last_error=channel.broken_reason or next(iter(errors), None),
        )

    return router


async def _attempt(call: Awaitable[T]) -> tuple[T | None, str | None]:
    """The result of a call to a vendor, or why it failed."""
    try:
        return await call, None
    except (EffectFailed, Transient, Unanswered, InvalidMessage, TooLarge) as error:
        return None, str(error)
