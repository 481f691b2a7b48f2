"""User: facts about tenants and people. They are kept 30 days, so they hold ids and no personal content."""

from __future__ import annotations

from protos.envelope import Message


class TenantCreated(Message, frozen=True, kw_only=True):
    """A customer organisation exists."""

    tenant_id: str
    name: str
    currency: str
    """ISO 4217."""
    credit_nanos: int | None
    """The amount that it may spend, in 10⁻⁹ of the currency; null for no limit."""


class SubjectErased(Message, frozen=True, kw_only=True):
    """A person's key was destroyed. Each service that keeps content of that subject erases it."""

    tenant_id: str
    subject_id: str


class TenantErased(Message, frozen=True, kw_only=True):
    """A customer organisation ends. Each service erases its data of the tenant, and publishes TenantDataErased."""

    tenant_id: str


class TenantDataErased(Message, frozen=True, kw_only=True):
    """A service has erased its data of an erased tenant. Each service publishes it, some minutes after TenantErased."""

    tenant_id: str
    service: str
