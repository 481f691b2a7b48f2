"""Holds: credit that is reserved for a use that is about to happen, in the table ``hold``.

A hold reserves credit until it ends or expires. An expired hold needs no release. Holds of a tenant are made and ended
only under the lock of the tenant's account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, Transient
from infra.postgres.tx import Tx
from services.billing import accounts, budgets, price_book
from services.billing.domain import UNITS, estimate, provisional

MAX_EXPIRY = timedelta(days=1)


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


async def reserve(tx: Tx, tenant_id: str, hold_id: UUID, request: HoldRequest) -> Reservation:
    """Reserves the largest possible cost of `request` if it fits into the credit and the budgets.

    A repeated request with the same hold_id gets the first answer. For a resource without a price it reserves a high
    provisional amount, at most the available credit, and is granted while any credit is available. The usage of such a
    resource is held for review and keeps its hold open, so unpriced use ends with the credit. Raises Transient if the
    tenant has no account yet. Raises InvalidMessage if the hold_id was used with another request, and for implausible
    quantities.
    """
    _check(request)
    try:
        currency, account = await accounts.lock_one(tx, tenant_id)
    except NotFound as error:
        raise Transient(f"{error} yet") from error
    asked = msgspec.json.encode(request, order="deterministic").decode()
    if known := await tx.sql(
        """
        SELECT request, granted, held_nanos, available_nanos, refused_by
        FROM hold
        WHERE tenant_id = $1 AND hold_id = $2
        """,
        tenant_id,
        hold_id,
    ):
        [(before, granted, held, available, refused_by)] = known
        if before != asked:
            raise InvalidMessage("hold_id", "was used before with another request")
        return Reservation(granted, held, available, currency, refused_by)
    prices = await price_book.versions(tx, [request.resource])
    try:
        amount = estimate(prices.get(request.resource, ()), currency, request.quantities, utcnow())
    except ValueError as error:
        raise InvalidMessage("quantities", str(error)) from error
    balance = account.balance_nanos
    available = None if balance is None else balance - await open_nanos(tx, tenant_id)
    names = request.agent_id, request.channel_id, request.session_key, request.api_key_id
    refused_by = ""
    budget = await budgets.rest(tx, budgets.Use(tenant_id, *names))
    if budget and (available is None or budget.nanos < available):
        available, refused_by = budget
    if amount is None:
        amount = provisional(request.quantities, currency)
        if available is not None:
            amount = min(amount, max(available, 0))
    granted = available is None or (available > 0 and available >= amount)
    held = amount if granted else 0
    left = None if available is None else available - held
    await tx.sql(
        """
        INSERT INTO hold (tenant_id, hold_id, request, granted, held_nanos, available_nanos, expires_at, ended_at,
                          outcome, agent_id, channel_id, session_key, api_key_id, refused_by)
        VALUES ($1, $2, $3, $4, $5, $6, clock_timestamp() + $7, CASE WHEN NOT $4 THEN clock_timestamp() END,
                CASE WHEN NOT $4 THEN 'refused' END, $8, $9, $10, $11, $12)
        """,
        tenant_id,
        hold_id,
        asked,
        granted,
        held,
        left,
        timedelta(milliseconds=request.expires_in_ms),
        *names,
        "" if granted else refused_by,
    )
    return Reservation(granted, held, left, currency, "" if granted else refused_by)


async def open_nanos(tx: Tx, tenant_id: str) -> int:
    """Returns the credit that the tenant's open holds reserve now."""
    [(held,)] = await tx.sql(
        """
        SELECT coalesce(sum(held_nanos), 0)::bigint
        FROM hold
        WHERE tenant_id = $1 AND ended_at IS NULL AND expires_at > clock_timestamp()
        """,
        tenant_id,
    )
    return int(held)


async def release(tx: Tx, tenant_id: str, hold_id: UUID) -> None:
    """Ends an unused hold. A hold that has ended or is not known stays unchanged."""
    await accounts.lock(tx, [tenant_id])
    await tx.sql(
        """
        UPDATE hold
        SET ended_at = clock_timestamp(), outcome = 'released'
        WHERE tenant_id = $1 AND hold_id = $2 AND ended_at IS NULL
        """,
        tenant_id,
        hold_id,
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
