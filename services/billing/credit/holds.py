"""Holds: credit that is reserved for a use that is about to happen, in the table ``hold``.

A hold reserves credit until it ends or expires. An expired hold needs no release. Holds of a tenant are made and ended
only under the lock of the tenant's account. Requests of a tenant that wait for it share a transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from uuid import UUID
from weakref import WeakValueDictionary

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, Transient
from infra.postgres.database import Database
from infra.postgres.group_commit import GroupCommit
from infra.postgres.tx import Tx
from services.billing.credit import accounts, budgets, grants
from services.billing.rating import price_book
from services.billing.rating.domain import UNITS, estimate, provisional

MAX_EXPIRY = timedelta(days=1)
# So many requests of a tenant share a transaction at most. It bounds how long they keep the account locked.
LARGEST_GROUP = 100


_OPEN = f"""
SELECT {grants.HELD}
FROM hold
WHERE tenant_id = $1 AND ended_at IS NULL AND expires_at > clock_timestamp()
"""
# Everything by which requests for holds are decided, in one round trip. It reads only; the account is locked.
_STATE = f"""
SELECT ARRAY({budgets.RESTS}),
       ARRAY(
           SELECT ROW(hold_id,
                      outcome IS NOT DISTINCT FROM 'charged' OR ended_at IS NULL AND expires_at > clock_timestamp(),
                      request, granted, held_nanos, available_nanos, refused_by, retry_later)
           FROM hold
           WHERE tenant_id = $1 AND hold_id = ANY($4::uuid[])
       ),
       ({_OPEN}),
       ARRAY({price_book.PRICES.format("$5")})
"""


class HoldRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """The use that a hold is requested for."""

    resource: str
    quantities: dict[str, int]
    """Unit → the largest quantity that may be used."""
    expires_in_ms: int
    agent_id: str = ""
    channel_id: str = ""
    session_key: str = ""
    api_key_id: str = ""


@dataclass(frozen=True)
class Reservation:
    """The answer to a request for a hold."""

    granted: bool
    held_nanos: int
    available_nanos: int | None
    """Credit that can still be held after this hold. None: no limit."""
    currency: str
    refused_by: str
    """The budget that refuses. Empty: the credit, or nothing."""
    retry_later: bool = False
    """A rate refuses, and the request fits into a minute without other uses."""


@dataclass
class _Reserve:
    """A request for a hold in a group. `answer` is set before the group's commit."""

    hold_id: UUID
    request: HoldRequest
    answer: Reservation | None = None

    @cached_property
    def text(self) -> str:
        """The column ``request``, by which a repeated request is known."""
        return msgspec.json.encode(self.request, order="deterministic").decode()


class Holds:
    """Requests for holds, and releases, of one process.

    Each tenant has a group of its own: it waits for no other tenant's account, and uses one connection at a time
    however many callers it has.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        # A group lives while a caller or its task refers to it.
        self._groups: WeakValueDictionary[str, GroupCommit[_Reserve | UUID]] = WeakValueDictionary()

    async def reserve(self, tenant_id: str, requests: Mapping[UUID, HoldRequest]) -> list[Reservation]:
        """Reserves the largest possible cost of each request, if all of them fit into the credit and the budgets.

        A repeated request with the same hold_id gets the first answer while its hold is open, and after its use was
        charged. One that was refused, or given back, or has expired, is decided again. For a resource
        without a price it reserves a high provisional amount, at most the available credit, and is granted while any
        credit is available. The usage of such a resource is held for review and keeps its hold open, so unpriced use
        ends with the credit. Raises Transient if the tenant has no account yet. Raises InvalidMessage if the hold_id
        was used with another request, and for implausible quantities.
        """
        for request in requests.values():
            _check(request)
        asked = [_Reserve(hold_id, request) for hold_id, request in requests.items()]
        group = self._group(tenant_id)
        await asyncio.gather(*map(group.write, asked))
        found = [one.answer for one in asked if one.answer is not None]
        if refused := next((answer for answer in found if not answer.granted), None):
            for one in asked:
                if one.answer is not refused:
                    await group.write(one.hold_id)
            return [refused] * len(found)
        return found

    async def release(self, tenant_id: str, hold_id: UUID) -> None:
        """Ends an unused hold. A hold that has ended or is not known stays unchanged."""
        await self._group(tenant_id).write(hold_id)

    def _group(self, tenant_id: str) -> GroupCommit[_Reserve | UUID]:
        if (group := self._groups.get(tenant_id)) is None:
            group = GroupCommit(partial(self._commit, tenant_id), largest=LARGEST_GROUP)
            self._groups[tenant_id] = group
        return group

    async def _commit(self, tenant_id: str, group: Sequence[_Reserve | UUID]) -> Mapping[int, Exception]:
        refused: Mapping[int, Exception] = {}
        async with self._database.begin(tenant_id=tenant_id) as tx:
            if asked := {index: write for index, write in enumerate(group) if isinstance(write, _Reserve)}:
                refused = await _reserve(tx, tenant_id, asked)
            # After the holds: one that is requested and released in the same group must not stay open.
            if ended := [write for write in group if isinstance(write, UUID)]:
                await release(tx, tenant_id, ended)
        return refused


async def _reserve(tx: Tx, tenant_id: str, asked: Mapping[int, _Reserve]) -> Mapping[int, Exception]:
    """Answers the requests in their order, as if each had a transaction of its own. Returns the errors of those that
    are refused, by their index."""
    requests = [one.request for one in asked.values()]
    resources = {request.resource for request in requests}
    try:
        currency, account = await accounts.lock_one(tx, tenant_id)
    except NotFound as error:
        raise Transient(f"{error} yet") from error
    # After the lock: the statement sees the holds and the spending that other transactions have committed before.
    [(rests, rows, open_nanos, priced)] = await tx.sql(
        _STATE,
        tenant_id,
        *budgets.scopes_of(requests),
        [one.hold_id for one in asked.values()],
        price_book.names_of(resources),
    )
    prices = price_book.versions_of(resources, priced)
    # A hold that was refused or given back, or has expired, holds nothing: granted again it would not reserve the use,
    # and refused again the work could never be done, however much credit there is now.
    known = {
        hold_id: (text, Reservation(granted, held, available, currency, refused_by, retry_later) if counts else None)
        for hold_id, counts, text, granted, held, available, refused_by, retry_later in rows
    }
    balance = account.balance_nanos
    credit = None if balance is None else balance - open_nanos
    limits = [budgets.Rest(*row) for row in rests]
    now = utcnow()
    made: list[tuple[_Reserve, Reservation]] = []
    refused: dict[int, Exception] = {}
    for index, one in asked.items():
        request = one.request
        if before := known.get(one.hold_id):
            text, one.answer = before
            if text != one.text:
                refused[index] = InvalidMessage("hold_id", "was used before with another request")
                continue
            if one.answer:
                continue
        try:
            amount = estimate(prices.get(request.resource, ()), currency, request.quantities, now)
        except ValueError as error:
            refused[index] = InvalidMessage("quantities", str(error))
            continue
        concerned = budgets.concerning(limits, request)
        one.answer = answer = _decide(request, amount, currency, credit, concerned)
        if credit is not None:
            credit -= answer.held_nanos
        for limit in concerned:
            limit.nanos -= answer.held_nanos
        known[one.hold_id] = one.text, answer
        if amount != 0 or not answer.granted:
            made.append((one, answer))
    if made:
        await _insert(tx, tenant_id, made)
    return refused


def _decide(
    request: HoldRequest, amount: int | None, currency: str, credit: int | None, limits: Sequence[budgets.Rest]
) -> Reservation:
    """amount: the largest possible cost; None: the resource has no price. credit: the available one; None: no limit.
    limits: the rests of the budgets that the use concerns."""
    available = credit
    least = min(limits, key=lambda limit: limit.nanos, default=None)
    if least and (available is None or least.nanos < available):
        available = least.nanos
    else:
        least = None
    if amount is None:
        amount = provisional(request.quantities, currency)
        if available is not None:
            amount = min(amount, max(available, 0))
    granted = available is None or (available > 0 and available >= amount)
    held = amount if granted else 0
    left = None if available is None else available - held
    if granted or not least:
        return Reservation(granted, held, left, currency, "")
    return Reservation(granted, held, left, currency, least.name, least.is_rate_for(amount))


async def _insert(tx: Tx, tenant_id: str, made: Sequence[tuple[_Reserve, Reservation]]) -> None:
    requests = [one.request for one, _ in made]
    await tx.sql(
        """
        INSERT INTO hold (tenant_id, hold_id, request, granted, held_nanos, available_nanos, expires_at, ended_at,
                          outcome, agent_id, channel_id, session_key, api_key_id, refused_by, retry_later)
        SELECT $1, id, request, granted, held, available, clock_timestamp() + expires_in,
               CASE WHEN NOT granted THEN clock_timestamp() END, CASE WHEN NOT granted THEN 'refused' END,
               agent, channel, session, key, refused_by, retry_later
        FROM unnest($2::uuid[], $3::text[], $4::bool[], $5::bigint[], $6::bigint[], $7::interval[], $8::text[],
                    $9::text[], $10::text[], $11::text[], $12::text[], $13::bool[])
             AS n(id, request, granted, held, available, expires_in, agent, channel, session, key, refused_by,
                  retry_later)
        ON CONFLICT (tenant_id, hold_id) DO UPDATE
        SET granted = excluded.granted, held_nanos = excluded.held_nanos, available_nanos = excluded.available_nanos,
            expires_at = excluded.expires_at, ended_at = excluded.ended_at, outcome = excluded.outcome,
            refused_by = excluded.refused_by, retry_later = excluded.retry_later
        """,
        tenant_id,
        [one.hold_id for one, _ in made],
        [one.text for one, _ in made],
        [answer.granted for _, answer in made],
        [answer.held_nanos for _, answer in made],
        [answer.available_nanos for _, answer in made],
        [timedelta(milliseconds=request.expires_in_ms) for request in requests],
        [request.agent_id for request in requests],
        [request.channel_id for request in requests],
        [request.session_key for request in requests],
        [request.api_key_id for request in requests],
        [answer.refused_by for _, answer in made],
        [answer.retry_later for _, answer in made],
    )


async def open_nanos(tx: Tx, tenant_id: str) -> int:
    """Returns the credit that the tenant's open holds reserve now."""
    [(held,)] = await tx.sql(_OPEN, tenant_id)
    return int(held)


async def release(tx: Tx, tenant_id: str, hold_ids: Sequence[UUID]) -> None:
    """Ends unused holds. A hold that has ended or is not known stays unchanged."""
    await accounts.lock(tx, [tenant_id])
    await tx.sql(
        """
        UPDATE hold
        SET ended_at = clock_timestamp(), outcome = 'released'
        WHERE tenant_id = $1 AND hold_id = ANY($2::uuid[]) AND ended_at IS NULL
        """,
        tenant_id,
        hold_ids,
    )


async def close(tx: Tx, holds: Sequence[tuple[str, UUID]]) -> None:
    """Ends the holds (tenant, hold) whose usage was charged. The caller has locked their accounts."""
    await tx.sql(
        """
        UPDATE hold AS h
        SET ended_at = clock_timestamp(), outcome = 'charged'
        FROM unnest($1::text[], $2::uuid[]) AS n(tenant_id, hold_id)
        WHERE h.tenant_id = n.tenant_id AND h.hold_id = n.hold_id AND h.ended_at IS NULL
        """,
        [tenant_id for tenant_id, _ in holds],
        [hold_id for _, hold_id in holds],
    )


def _check(request: HoldRequest) -> None:
    if not request.resource or "\x00" in request.resource:
        raise InvalidMessage("resource", "must not be empty or contain a NUL")
    for field in ("agent_id", "channel_id", "session_key", "api_key_id"):
        if "\x00" in getattr(request, field):
            raise InvalidMessage(field, "must not contain a NUL")
    if not 0 < request.expires_in_ms <= MAX_EXPIRY / timedelta(milliseconds=1):
        raise InvalidMessage("expires_in_ms", "must be from 1 to 86400000 (one day)")
    if unknown := sorted(request.quantities.keys() - UNITS):
        raise InvalidMessage(f"quantities.{unknown[0]}", f"is not a unit; must be one of {', '.join(sorted(UNITS))}")
