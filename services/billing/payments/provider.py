"""The interface of a payment provider."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple, Protocol
from uuid import UUID

CANCELLED = "it was cancelled"
"""The failure of a payment that was ended before it took money."""

EventKind = Literal[
    "succeeded",
    "failed",
    "declined",
    "refunded",
    "refund",
    "refund_failed",
    "dispute_open",
    "dispute_won",
    "dispute_lost",
    "ignored",
]


class PaymentRequest(NamedTuple):
    """A payment that is asked for."""

    payment_id: UUID
    """Also the idempotency key: the provider makes one payment of it, however often it is asked."""
    amount_minor: int
    currency: str
    customer: str
    method: str
    """The provider's ids of the tenant and of a saved method. Empty: the payer enters one."""
    description: str


class Intent(NamedTuple):
    """The state of a payment at its provider."""

    reference: str
    status: Literal["pending", "succeeded", "failed", "declined"]
    """declined: by the last attempt. The payer's browser may make another one, a saved method does not."""
    received_minor: int
    failure: str
    client_secret: str
    """With it the payer's browser completes the payment. Empty if that is not needed."""


class ProviderEvent(NamedTuple):
    """A fact that the provider reports."""

    id: str
    kind: EventKind
    reference: str
    """The provider's id of the payment."""
    payment_id: str
    """Ours, if the provider repeats it."""
    minor: int
    """succeeded: received. refunded: the sum of all refunds. refund: the amount of this one. dispute: the money that is
    withdrawn for it."""
    currency: str
    detail: str
    """failed, declined: the reason. refund, dispute: the provider's id of it."""
    refund_id: str = ""
    """refund: ours, if it was asked for here."""
    movements: int = 0
    """dispute: how often money was withdrawn or reinstated. It only grows."""


class PaymentProvider(Protocol):
    name: str

    async def save(self, tenant_id: str, token: str, customer: str) -> tuple[str, str]:
        """Attaches a method to a customer, who is made if `customer` is empty or not known to the provider. Returns
        (customer, method).

        Raises InvalidMessage (field ``token``) if the provider refuses it.
        """

    async def remove(self, method: str) -> None:
        """Detaches a method, so that it takes no money any more. One that is gone already stays so."""

    async def forget(self, customer: str) -> None:
        """Deletes a customer with all methods. One that is gone already stays so."""

    async def prepare(self, request: PaymentRequest) -> Intent:
        """Makes a payment that takes no money yet.

        Raises Transient or Unanswered if the provider does not answer, as the next three do; it may be asked again.
        """

    async def charge(self, reference: str, request: PaymentRequest) -> Intent:
        """Takes the money of a payment by its saved method."""

    async def look(self, reference: str) -> Intent:
        """The state of a payment that was prepared before."""

    async def cancel(self, reference: str) -> Intent:
        """Ends a payment, so that it takes no money any more. Returns its state: it may have succeeded before, and one
        that is being processed stays pending."""

    async def refund(self, reference: str, minor: int, currency: str, key: UUID) -> None:
        """Gives a part of a payment back, once for a key. Raises Conflict if the provider refuses."""

    async def has_refund(self, reference: str, key: UUID) -> bool:
        """Whether `refund` was made for this key, however it ended."""

    def event(self, headers: Mapping[str, str], body: bytes, now: datetime) -> ProviderEvent:
        """Raises Unauthenticated for a forged or stale call."""
