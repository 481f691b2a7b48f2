"""User's public facts: tenants and people. Kept 30 days, so they hold ids and no personal content."""

from __future__ import annotations

from protos.envelope import Message


class TenantCreated(Message, frozen=True, kw_only=True):
    """A customer organisation exists.

    currency: ISO 4217.
    credit_nanos: what it may spend, in 10⁻⁹ of the currency; null: without limit.
    """

    tenant_id: str
    name: str
    currency: str
    credit_nanos: int | None


class SubjectErased(Message, frozen=True, kw_only=True):
    """A person's key was destroyed. Whoever keeps anything of that subject erases it."""

    tenant_id: str
    subject_id: str
