"""Audit records, written in the transaction of the act itself: both commit or neither does."""

from __future__ import annotations

from typing import Literal

from infra.clock import utcnow
from infra.postgres.tx import Tx
from protos.catalog import AUDIT_LOGS
from protos.messages.audit import ActAudited


def audit(tx: Tx, actor: str, action: str, object_kind: str, object_id: str, **details: str) -> None:
    """Records that `actor` did `action` to the object, in the chain of the transaction's tenant.

    A transaction without a tenant writes to the chain of the system.
    """
    _record(tx, actor, action, object_kind, object_id, "done", details)


def audit_refusal(tx: Tx, actor: str, action: str, object_kind: str, object_id: str, **details: str) -> None:
    """Records that `actor` was refused."""
    _record(tx, actor, action, object_kind, object_id, "denied", details)


def _record(
    tx: Tx,
    actor: str,
    action: str,
    object_kind: str,
    object_id: str,
    outcome: Literal["done", "denied"],
    details: dict[str, str],
) -> None:
    act = ActAudited(
        tenant_id=tx.tenant_id,
        at=utcnow(),
        actor=actor,
        action=action,
        object_kind=object_kind,
        object_id=object_id,
        outcome=outcome,
        details=details,
    )
    tx.publish(AUDIT_LOGS, act, key=tx.tenant_id or "system")
