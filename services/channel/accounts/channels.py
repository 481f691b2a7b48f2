"""Channels as the API shows them, and the checks of a tenant's input for them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from uuid import UUID

import msgspec
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.errors import InvalidMessage, NotFound, Transient
from infra.outgoing.client import Outgoing
from infra.postgres.tx import Tx
from infra.web.http import decode_json
from protos.catalog import CHANNEL_TYPES
from protos.messages.channel import ASKER, CHAT_ADMINS
from services.channel.accounts.routing import Route
from services.channel.accounts.store import WEBHOOK_PATH, AccountSecrets
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Groups, Vendor

COLUMNS = """
    id, type, agent_id, token, api_base, enabled, broken_reason, streaming, routes, groups, approvers, created_at,
    updated_at, seq
"""

Credentials = Annotated[
    dict[str, str], Field(description="The fields depend on the channel type. They are never shown again.")
]


class AgentRoute(BaseModel):
    """Messages for an agent of their own: of a conversation with its threads, or with a command, or both.

    A command is ``/name`` or ``@name`` at the beginning of the text; the agent does not see it.
    """

    model_config = ConfigDict(extra="forbid")

    agent_id: UUID
    conversation_id: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    """The vendor's id, as in ``GET /api/v1/messages``."""
    command: Annotated[str | None, Field(pattern="^[A-Za-z0-9_-]{1,32}$")] = None

    @model_validator(mode="after")
    def _is_of_something(self) -> AgentRoute:
        if not self.conversation_id and not self.command:
            raise ValueError("must have a conversation_id or a command")
        return self


Routes = Annotated[list[AgentRoute], Field(max_length=50)]
# A client of the API writes in no channel, so its names are not among them.
Approver = Annotated[str, Field(pattern=rf"^({ASKER}|{CHAT_ADMINS}|person:[^\s,]{{1,100}})$")]
Approvers = Annotated[tuple[Approver, ...], Field(max_length=100)]


class Channel(BaseModel):
    """A channel account as the API shows it."""

    id: UUID
    type: str
    agent_id: UUID
    webhook_path: str
    api_base: str | None
    enabled: bool
    state: Literal["ok", "broken"]
    """``broken``: the vendor refuses the account. Nothing is sent until the channel is repaired."""
    broken_reason: str | None
    streaming: bool
    """An answer is shown while it is written, if the vendor can."""
    routes: list[AgentRoute]
    """The first that fits a message names its agent; ``agent_id`` gets all others."""
    groups: Groups
    """The messages of groups that start a run: ``all``, ``mentions`` of the bot and replies to it, or only
    ``replies``."""
    approvers: Approvers
    """Who may allow a tool call by a yes in this channel: asker, chat-admins or ``person:<subject id>``. Empty: whom
    the agent's ``approvers`` name."""
    created_at: datetime
    updated_at: datetime


async def get(tx: Tx, secrets: AccountSecrets, channel_id: UUID) -> Channel:
    rows = await tx.sql(f"SELECT {COLUMNS} FROM account WHERE id = $1", channel_id)
    if not rows:
        raise NotFound("the tenant has no channel with this id")
    return view(secrets, rows[0])


def view(secrets: AccountSecrets, row: tuple[Any, ...]) -> Channel:
    id_, type_, agent_id, token, api_base, enabled, broken_reason, streaming = row[:8]
    routes, groups, approvers, created_at, updated_at, _ = row[8:]
    path = WEBHOOK_PATH.format(type=type_, token=secrets.open(id_, "token", token).decode())
    return Channel(
        id=id_,
        type=type_,
        agent_id=agent_id,
        webhook_path=path,
        api_base=api_base,
        enabled=enabled,
        state="broken" if broken_reason else "ok",
        broken_reason=broken_reason,
        streaming=streaming,
        routes=[_route(route) for route in (secrets.routes(id_, routes) if routes else ())],
        groups=groups,
        approvers=approvers,
        created_at=created_at,
        updated_at=updated_at,
    )


def _route(route: Route) -> AgentRoute:
    return AgentRoute(
        agent_id=route.agent_id, conversation_id=route.conversation_id or None, command=route.command or None
    )


def sealed_routes(secrets: AccountSecrets, channel_id: UUID, routes: Sequence[AgentRoute]) -> bytes:
    stored = [Route(route.agent_id, route.conversation_id or "", route.command or "") for route in routes]
    return secrets.seal_routes(channel_id, stored)


def vendor_of(type_: str) -> Vendor[Any]:
    if type_ not in CHANNEL_TYPES:
        raise InvalidMessage("type", f"must be one of {', '.join(CHANNEL_TYPES)}")
    if type_ not in VENDORS:
        raise InvalidMessage("type", "is not available yet")
    return VENDORS[type_]


def checked_groups(vendor: Vendor[Any], groups: Groups) -> Groups:
    if groups not in vendor.groups:
        raise InvalidMessage("groups", f"must be {' or '.join(vendor.groups)} for a {vendor.name} channel")
    return groups


async def checked_credentials(outgoing: Outgoing, vendor: Vendor[Any], given: dict[str, str]) -> bytes:
    """The credentials as JSON, validated for the vendor. Raises InvalidMessage that names the field."""
    try:
        credentials: msgspec.Struct = decode_json(msgspec.json.encode(given), vendor.credentials)
    except InvalidMessage as error:
        raise InvalidMessage(f"credentials.{error.field}", error.reason) from None
    # The signs that patterns name do not exclude a line break at the end: `$` matches before it.
    for field, value in msgspec.structs.asdict(credentials).items():
        if isinstance(value, str) and value != value.strip():
            raise InvalidMessage(f"credentials.{field}", "must not begin or end with white space")
    for field in vendor.addresses:
        # An optional one may be empty.
        if address := getattr(credentials, field):
            await reachable(outgoing, f"credentials.{field}", address)
    return msgspec.json.encode(credentials)


async def checked_origin(outgoing: Outgoing, vendor: Vendor[Any], api_base: str | None) -> str | None:
    if api_base is None:
        return None
    if not vendor.origin:
        raise InvalidMessage(
            "api_base", f"does not apply to a {vendor.name} channel; its credentials contain the address"
        )
    url = urlsplit(api_base)
    if url.path not in ("", "/") or url.query or url.fragment:
        raise InvalidMessage("api_base", "must be an origin without a path, such as https://host:port")
    await reachable(outgoing, "api_base", api_base)
    return api_base.removesuffix("/")


async def reachable(outgoing: Outgoing, field: str, url: str) -> None:
    """Raises InvalidMessage that names the field if the address may not be called, or its name does not resolve."""
    try:
        await outgoing.check(url)
    except InvalidMessage as error:
        raise InvalidMessage(field, error.reason) from None
    except Transient as error:
        raise InvalidMessage(field, str(error)) from error
