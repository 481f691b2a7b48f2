"""The record of an operator's act, in the transaction of the act itself: one is not there without the other."""

from __future__ import annotations

from infra.clock import utcnow
from infra.postgres.tx import Tx
from protos.catalog import AUDIT_LOGS
from protos.messages.audit import ActAudited


def audit(tx: Tx, actor: str, action: str, object_kind: str, object_id: str, **details: str) -> None:
    """Says that `actor` did `action` to the object. In the tenant's chain, or in the system's where `tx` has none."""
    act = ActAudited(
        tenant_id=tx.tenant_id,
        at=utcnow(),
        actor=actor,
        action=action,
        object_kind=object_kind,
        object_id=object_id,
        outcome="done",
        details=details,
    )
    tx.publish(AUDIT_LOGS, act, key=tx.tenant_id or "system")
