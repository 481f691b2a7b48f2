"""Channel accounts: their stored form, their secrets, and a cache of accounts by webhook token."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import time
from collections.abc import Awaitable, Sequence
from contextvars import Context
from datetime import datetime
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import msgspec

from infra.errors import Transient, Unauthenticated, describe
from infra.lanes.effects import Effects
from infra.observe.logs import get_logger
from infra.outgoing import shares
from infra.outgoing.client import Outgoing
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.recent import Recent
from infra.security.audit import audit
from infra.security.crypto import KEY_BYTES, Cipher
from infra.security.rewrap import SealedColumn
from protos.catalog import CHANNEL_EVENTS, NOTIFICATION_EMAIL
from protos.messages.channel import AccountBroken
from protos.messages.notification import SendEmail
from services.channel.accounts.routing import Route
from services.channel.domain import Pseudonyms
from services.channel.vendors import VENDORS
from services.channel.vendors.base import AccountRefused, Groups, Request, Vendor
from services.channel.vendors.items import Received

T = TypeVar("T")

WEBHOOKS = "/webhooks"
WEBHOOK_PATH = WEBHOOKS + "/{type}/{token}"
# A process may use its cached copy of an account for this long. A change by another process takes effect after it.
CACHE_SECONDS = 3.0
UNKNOWN_SECONDS = 5.0
CACHE_SIZE = 10_000
# A bot gets another name rarely.
IDENTITY_SECONDS = 3_600.0
UNKNOWN_IDENTITY_SECONDS = 60.0
TOKEN_BYTES = 24
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32}")

_log = get_logger("channel.accounts")

COLUMNS = """
    account.id, account.tenant_id, account.type, account.agent_id, account.credentials, account.pseudonyms,
    account.api_base, account.enabled, account.broken_reason, account.streaming, account.routes, account.groups,
    account.approvers, account.old_credentials, account.old_until, account.identity
"""
"""Of the table ``account``, as `AccountSecrets.account` takes them."""

SEALED = tuple(
    SealedColumn("account", column, "channel account", ("id::text", f"'{column.removeprefix('old_')}'"))
    for column in ("token", "credentials", "old_credentials", "pseudonyms", "routes")
)


class ChannelAccount(NamedTuple):
    """A channel account with its secrets decrypted."""

    id: UUID
    tenant_id: str
    vendor: Vendor[Any]
    agent_id: UUID
    credentials: Any
    pseudonyms: Pseudonyms
    origin: str
    """The origin of the vendor's API, such as ``https://slack.com``."""
    enabled: bool
    broken_reason: str | None
    streaming: bool = True
    """An answer is shown while it is written, if the vendor can."""
    routes: tuple[Route, ...] = ()
    groups: Groups = "all"
    approvers: tuple[str, ...] = ()
    """Who may decide by a message in this channel; empty: whom the agent's definition names."""
    old_credentials: Any = None
    """Those before the last rotation. A call that they prove is accepted until `old_until`."""
    old_until: datetime | None = None
    identity: str = ""
    """The account's name at the vendor, as last known; empty: not known."""
    sealed_credentials: bytes = b""
    """As stored. They show whether the credentials were changed meanwhile."""

    def receive(self, request: Request, now: datetime) -> Received:
        """As `Vendor.receive`, with the old credentials too during a rotation."""
        try:
            return self.vendor.receive(request, self.credentials, now)
        except Unauthenticated:
            if self.old_until is None or now >= self.old_until:
                raise
            return self.vendor.receive(request, self.old_credentials, now)


class AccountSecrets:
    """Encrypts and decrypts the secret fields of accounts. A value is bound to its account and field."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    def seal(self, account_id: UUID, field: str, content: str | bytes) -> bytes:
        return self._cipher.seal(content, "channel account", str(account_id), field)

    def open(self, account_id: UUID, field: str, sealed: bytes) -> bytes:
        return self._cipher.open(sealed, "channel account", str(account_id), field)

    def routes(self, account_id: UUID, sealed: bytes) -> tuple[Route, ...]:
        return msgspec.json.decode(self.open(account_id, "routes", sealed), type=tuple[Route, ...])

    def seal_routes(self, account_id: UUID, routes: Sequence[Route]) -> bytes:
        return self.seal(account_id, "routes", msgspec.json.encode(routes))

    def account(self, row: tuple[Any, ...]) -> ChannelAccount:
        id_, tenant_id, type_, agent_id, credentials, pseudonyms, api_base, enabled, broken_reason, streaming = row[:10]
        routes, groups, approvers, old, old_until, identity = row[10:]
        vendor = VENDORS[type_]

        def opened(sealed: bytes) -> Any:
            return msgspec.json.decode(self.open(id_, "credentials", sealed), type=vendor.credentials)

        return ChannelAccount(
            id_,
            tenant_id,
            vendor,
            agent_id,
            opened(credentials),
            Pseudonyms(self.open(id_, "pseudonyms", pseudonyms)),
            api_base or vendor.origin,
            enabled,
            broken_reason,
            streaming,
            () if routes is None else self.routes(id_, routes),
            groups,
            tuple(approvers),
            None if old is None else opened(old),
            old_until,
            identity or "",
            credentials,
        )


def new_token() -> str:
    """A random token for a webhook path. It hides the path; the signature proves the vendor."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def new_pseudonyms() -> bytes:
    return os.urandom(KEY_BYTES)


def token_hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


async def read(tx: Tx, secrets_: AccountSecrets, account_id: UUID) -> ChannelAccount | None:
    """The current account; None if it was deleted."""
    rows = await tx.sql(f"SELECT {COLUMNS} FROM account WHERE id = $1", account_id)
    return secrets_.account(rows[0]) if rows else None


async def unless_replaced(effects: Effects, account: ChannelAccount, call: Awaitable[T]) -> T:
    """The vendor's answer. Raises Transient if the vendor has refused credentials that were replaced meanwhile: the
    next attempt has the new ones."""
    try:
        return await call
    except AccountRefused as error:
        async with effects.reading() as tx:
            if await tx.sql(
                "SELECT FROM account WHERE id = $1 AND credentials <> $2", account.id, account.sealed_credentials
            ):
                raise Transient("the credentials of the channel were replaced meanwhile") from error
        raise


class Accounts:
    """Accounts by webhook token, cached for `CACHE_SECONDS`. An unknown token is cached for `UNKNOWN_SECONDS`: tokens
    are random, so no vendor sends one before it is made."""

    def __init__(self, database: Database, secrets_: AccountSecrets) -> None:
        self._database = database
        self._secrets = secrets_
        self._known: dict[str, tuple[float, ChannelAccount]] = {}
        self._unknown: dict[str, float] = {}
        self._reading: dict[str, asyncio.Task[ChannelAccount | None]] = {}
        self._identified: Recent[UUID, float] = Recent(CACHE_SIZE)
        """When the identity of an account was last asked for."""
        self._identifying: set[asyncio.Task[None]] = set()

    def cached(self, type_: str, token: str) -> ChannelAccount | None:
        """The account, if `by_token` would return it without waiting."""
        until, account = self._known.get(token, (0.0, None))
        return account if account and until >= time.monotonic() and account.vendor.name == type_ else None

    async def by_token(self, type_: str, token: str) -> ChannelAccount | None:
        if not _TOKEN.fullmatch(token):
            return None
        now = time.monotonic()
        if self._unknown.get(token, 0.0) > now:
            return None
        until, account = self._known.get(token, (0.0, None))
        if account is not None and until < now:
            # This request refreshes the entry. Concurrent requests keep the cached account, so that not all of them
            # query the database at once.
            self._known[token] = now + CACHE_SECONDS, account
        if until < now:
            account = await self._read_once(token)
        return account if account and account.vendor.name == type_ else None

    async def _read_once(self, token: str) -> ChannelAccount | None:
        """One query for all requests that ask at the same moment, such as those after a restart."""
        reading = self._reading.get(token)
        if reading is None:
            reading = self._reading[token] = asyncio.create_task(self._read(token), context=Context())
            reading.add_done_callback(lambda _: self._reading.pop(token))
        # A request that goes away must not cancel the query of the others.
        return await asyncio.shield(reading)

    async def _read(self, token: str) -> ChannelAccount | None:
        # One round trip. Calls wait for it.
        rows = await self._database.autocommit(
            f"SELECT {COLUMNS} FROM account WHERE token_hash = $1", token_hash(token)
        )
        if not rows:
            self._known.pop(token, None)
            if len(self._unknown) >= CACHE_SIZE:
                self._unknown.clear()
            self._unknown[token] = time.monotonic() + UNKNOWN_SECONDS
            return None
        account = self._secrets.account(rows[0])
        if len(self._known) >= CACHE_SIZE:
            self._known.clear()
        self._known[token] = time.monotonic() + CACHE_SECONDS, account
        return account

    def forget(self, account_id: UUID) -> None:
        """Drops the cached account, so that a change made by this process takes effect here at once."""
        for token, (_, account) in list(self._known.items()):
            if account.id == account_id:
                del self._known[token]

    def refresh_identity(self, account: ChannelAccount, outgoing: Outgoing) -> None:
        """Begins to ask the vendor for the account's identity, unless that was done recently. After a failure the known
        one stays."""
        now, pause = time.monotonic(), IDENTITY_SECONDS if account.identity else UNKNOWN_IDENTITY_SECONDS
        if now - self._identified.get(account.id, -pause) < pause:
            return
        self._identified[account.id] = now
        task = asyncio.create_task(self._identify(account, outgoing), context=Context())
        self._identifying.add(task)
        task.add_done_callback(self._identifying.discard)

    async def _identify(self, account: ChannelAccount, outgoing: Outgoing) -> None:
        shares.work_for(account.tenant_id)
        try:
            identity = await account.vendor.identify(outgoing, account.origin, account.credentials)

            async def work(tx: Tx) -> None:
                await keep_identity(tx, self._secrets, account, identity)

            await self._database.run(work, tenant_id=account.tenant_id)
        except Exception as error:
            _log.warning("could not read the name of the bot", channel_id=str(account.id), error=describe(error))
            return
        self.forget(account.id)


async def keep_identity(tx: Tx, secrets_: AccountSecrets, account: ChannelAccount, identity: str) -> None:
    """Stores the account's name at the vendor, unless the account has other credentials meanwhile."""
    # Locks the account: the change of its credentials forgets the name.
    await tx.sql("SELECT FROM account WHERE id = $1 FOR UPDATE", account.id)
    current = await read(tx, secrets_, account.id)
    if current and current.credentials == account.credentials:
        await tx.sql("UPDATE account SET identity = $2 WHERE id = $1", account.id, identity)


async def break_account(tx: Tx, account: ChannelAccount, error: str) -> None:
    """Marks the account as broken, unless it has other credentials meanwhile. The owners get one e-mail, however many
    deliveries fail."""
    reason = error.removeprefix(AccountRefused.PREFIX)
    if not await tx.sql(
        """
        UPDATE account SET broken_reason = $2, updated_at = clock_timestamp()
        WHERE id = $1 AND broken_reason IS NULL AND credentials = $3 RETURNING id
        """,
        account.id,
        reason,
        account.sealed_credentials,
    ):
        return
    type_ = account.vendor.name
    broken = AccountBroken(channel_id=account.id, channel_type=type_, reason=reason)
    tx.publish(CHANNEL_EVENTS, broken, key=str(account.id))
    # Without the reason: the server may be the tenant's own, and would write e-mails to any address.
    text = (
        f"The vendor refuses your {type_} channel {account.id}. Its `broken_reason` says why "
        f"(GET /api/v1/channels/{account.id}).\n\n"
        "Inbound messages are still accepted, but no reply is sent until the channel has working credentials "
        f"(PATCH /api/v1/channels/{account.id}).\n"
    )
    tx.send(NOTIFICATION_EMAIL, SendEmail(to="", subject=f"Your {type_} channel no longer works", text=text))
    audit(tx, "service:channel", "channel.broken", "channel", str(account.id), reason=reason)
