"""HTTP API of channel accounts, and the list of all routes of the service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict
from starlette.routing import BaseRoute

from infra.clock import uuid7
from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Paging, Reader, Writer, api, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from services.channel import connection_api, delivery_api, messages_api
from services.channel.accounts.agent_client import Agents
from services.channel.accounts.channels import (
    COLUMNS,
    Approvers,
    Channel,
    Credentials,
    Routes,
    checked_credentials,
    checked_groups,
    checked_origin,
    get,
    sealed_routes,
    vendor_of,
    view,
)
from services.channel.accounts.store import Accounts, AccountSecrets, new_pseudonyms, new_token, token_hash
from services.channel.intake import webhooks
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Groups, Preview, Vendor

MAX_CHANNELS = 1_000
"""Of a tenant."""


class NewChannel(BaseModel):
    """The body of ``POST /api/v1/channels``."""

    model_config = ConfigDict(extra="forbid")

    type: str
    agent_id: UUID
    credentials: Credentials
    api_base: str | None = None
    """An origin that replaces the origin of the vendor's API."""
    streaming: bool = True
    """An answer is shown while it is written, if the vendor can."""
    routes: Routes = []
    """The first that fits a message names its agent; ``agent_id`` gets all others."""
    groups: Groups = "all"
    approvers: Approvers = ()
    """Who may allow a tool call by a yes in this channel; empty: whom the agent's ``approvers`` name."""


class ChannelChange(BaseModel):
    """The body of ``PATCH``. Absent fields stay as they are. New credentials or ``enabled: true`` also repair a broken
    channel."""

    model_config = ConfigDict(extra="forbid")

    agent_id: UUID | None = None
    credentials: Credentials | None = None
    enabled: bool | None = None
    streaming: bool | None = None
    routes: Routes | None = None
    groups: Groups | None = None
    approvers: Approvers | None = None


class ChannelPage(BaseModel):
    items: list[Channel]
    next: str | None


class Abilities(BaseModel):
    """The abilities in which types of channels differ."""

    groups: list[Groups]
    """The choices for a channel's `groups`."""
    live_answers: Preview | None
    """How a person sees an answer while it is written; null: not at all."""
    typing: bool
    """The vendor shows that the bot is typing."""
    sends_files: dict[str, int]
    """The largest file in bytes, by MIME type; of all other types under the empty name. Any other file is sent as a
    link."""
    registers: bool
    """`POST …/register` tells the vendor the address of the webhook. False: a person enters it at the vendor."""


class ChannelType(BaseModel):
    """A type of channel, with everything that is needed to connect one."""

    type: str
    credentials: dict[str, Any]
    """JSON Schema of the credentials."""
    is_idempotent: bool
    """The vendor drops repeats of a message, so an unanswered send is repeated and not left unknown."""
    abilities: Abilities
    steps: list[str]


class ChannelTypes(BaseModel):
    items: list[ChannelType]
    next: None = None


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    secrets = AccountSecrets(runtime.cipher)
    accounts = Accounts(runtime.worker, secrets)
    administration = _router(runtime, secrets, accounts)
    return [
        *webhooks.routes(runtime, accounts),
        *api(
            "channel",
            runtime,
            administration,
            connection_api.router(runtime, secrets, accounts),
            messages_api.router(runtime, secrets),
            _types_router(),
            delivery_api.router(runtime),
        ),
    ]


def _types_router() -> APIRouter:
    router = APIRouter(prefix="/api/v1/channel-types", tags=["channels"])

    @router.get("")
    async def list_channel_types(who: Reader) -> ChannelTypes:
        """The types of channels, with the schema of their credentials and the steps to connect one."""
        return ChannelTypes(
            items=[
                ChannelType(
                    type=name,
                    credentials=_schema(vendor),
                    is_idempotent=vendor.effect == "keyed",
                    abilities=_abilities(vendor),
                    steps=list(vendor.steps),
                )
                for name, vendor in sorted(VENDORS.items())
            ]
        )

    return router


def _abilities(vendor: Vendor[Any]) -> Abilities:
    return Abilities(
        groups=list(vendor.groups),
        live_answers=vendor.preview,
        typing=vendor.sign_seconds > 0,
        sends_files=dict(vendor.files),
        registers=type(vendor).register is not Vendor.register,
    )


def _schema(vendor: Vendor[Any]) -> dict[str, Any]:
    schema = msgspec.json.schema(vendor.credentials)
    found: dict[str, Any] = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    return found


def _router(runtime: Runtime, secrets: AccountSecrets, accounts: Accounts) -> APIRouter:
    router = APIRouter(prefix="/api/v1/channels", tags=["channels"])
    agents = Agents(runtime.settings.agent_url, runtime.identities, runtime.tls)

    @router.post("", status_code=201, response_model=Channel)
    async def create_channel(body: NewChannel, who: Writer, request: Request) -> Response:
        """Connects a vendor account to an agent. The vendor must be told to call ``webhook_path`` on this host."""
        vendor = vendor_of(body.type)
        credentials = await checked_credentials(runtime.outgoing, vendor, body.credentials)
        api_base = await checked_origin(runtime.outgoing, vendor, body.api_base)
        await agents.check(body.agent_id, who)
        await agents.check_routes(body.routes, who)
        groups = checked_groups(vendor, body.groups)

        async def work(tx: Tx) -> tuple[int, BaseModel]:
            # Creations at the same time take turns: each counts the channels of those before it.
            await tx.take_turn(f"channels of {who.tenant_id}")
            [(count,)] = await tx.sql("SELECT count(*) FROM account")
            if count >= MAX_CHANNELS:
                raise Conflict(f"a tenant may have {MAX_CHANNELS} channels; delete one first")
            id_, token = uuid7(), new_token()
            await tx.sql(
                """
                INSERT INTO account (id, tenant_id, type, agent_id, token_hash, token, credentials, pseudonyms,
                api_base, streaming, routes, groups, approvers)
                VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
                """,
                id_,
                who.tenant_id,
                vendor.name,
                body.agent_id,
                token_hash(token),
                secrets.seal(id_, "token", token),
                secrets.seal(id_, "credentials", credentials),
                secrets.seal(id_, "pseudonyms", new_pseudonyms()),
                api_base,
                body.streaming,
                sealed_routes(secrets, id_, body.routes),
                groups,
                body.approvers,
            )
            audit(tx, who.actor, "channel.create", "channel", str(id_), type=vendor.name)
            return 201, await get(tx, secrets, id_)

        return await once(request, runtime, who, work)

    @router.get("")
    async def list_channels(who: Reader, paging: Paging) -> ChannelPage:
        """The channels of the tenant, oldest first."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                f"SELECT {COLUMNS} FROM account WHERE seq > $1 ORDER BY seq LIMIT $2",
                delivery_api.position(paging.after, start=0),
                paging.limit + 1,
            )
        found = page(rows, paging, key=lambda row: str(row[-1]))
        return ChannelPage(items=[view(secrets, row) for row in found["items"]], next=found["next"])

    @router.get("/{channel_id}")
    async def get_channel(channel_id: UUID, who: Reader) -> Channel:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            return await get(tx, secrets, channel_id)

    @router.patch("/{channel_id}")
    async def change_channel(channel_id: UUID, body: ChannelChange, who: Writer) -> Channel:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            before = await get(tx, secrets, channel_id)
        if body.agent_id:
            await agents.check(body.agent_id, who)
        await agents.check_routes(body.routes or (), who)
        if body.groups:
            checked_groups(vendor_of(before.type), body.groups)
        sealed = None
        if body.credentials is not None:
            credentials = await checked_credentials(runtime.outgoing, vendor_of(before.type), body.credentials)
            sealed = secrets.seal(channel_id, "credentials", credentials)
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await tx.sql(
                """
                UPDATE account
                SET agent_id = coalesce($2, agent_id), credentials = coalesce($3, credentials),
                    -- Without an overlap, a call with the old credentials is refused at once.
                    old_until = CASE WHEN $3::bytea IS NULL THEN old_until END,
                    old_credentials = CASE WHEN $3::bytea IS NULL THEN old_credentials END,
                    identity = CASE WHEN $3::bytea IS NULL THEN identity END,
                    enabled = coalesce($4, enabled), streaming = coalesce($6, streaming),
                    routes = coalesce($7, routes), groups = coalesce($8, groups),
                    approvers = coalesce($9, approvers),
                    broken_reason = CASE WHEN $5 THEN NULL ELSE broken_reason END,
                    updated_at = clock_timestamp()
                WHERE id = $1
                """,
                channel_id,
                body.agent_id,
                sealed,
                body.enabled,
                sealed is not None or body.enabled is True,
                body.streaming,
                None if body.routes is None else sealed_routes(secrets, channel_id, body.routes),
                body.groups,
                body.approvers,
            )
            changed = ", ".join(sorted(body.model_dump(exclude_none=True)))
            audit(tx, who.actor, "channel.update", "channel", str(channel_id), changed=changed)
            after = await get(tx, secrets, channel_id)
        accounts.forget(channel_id)
        return after

    @router.delete("/{channel_id}", status_code=204)
    async def delete_channel(channel_id: UUID, who: Writer) -> None:
        """Deletes a channel. Its webhook answers 404 at once. Its queued deliveries fail."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await tx.sql("DELETE FROM account WHERE id = $1 RETURNING id", channel_id):
                raise NotFound("the tenant has no channel with this id")
            audit(tx, who.actor, "channel.delete", "channel", str(channel_id))
        accounts.forget(channel_id)

    return router
