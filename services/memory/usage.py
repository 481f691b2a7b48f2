"""Reports the tokens of every embedding call and every indexed document to billing."""

from __future__ import annotations

from uuid import UUID

from infra.clock import utcnow
from infra.postgres.tx import Tx
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded


def record_usage(tx: Tx, model: str, usage_id: str, tokens: int, *, estimated: bool = False) -> None:
    """Records that the tenant of `tx` had `tokens` embedded by `model`. `usage_id` is unique per attempt."""
    tenant_id = tx.tenant_id
    assert tenant_id is not None
    record = UsageRecorded(
        tenant_id=tenant_id,
        usage_id=usage_id,
        resource=f"embedding/{model}",
        quantities={"input_tokens": tokens},
        occurred_at=utcnow(),
        estimated=estimated,
    )
    tx.publish(USAGE_RECORDS, record, key=tenant_id)


def record_document(tx: Tx, id_: UUID) -> None:
    """Records that a document, or one version of it, was indexed."""
    tenant_id = tx.tenant_id
    assert tenant_id is not None
    record = UsageRecorded(
        tenant_id=tenant_id,
        usage_id=f"document/{id_}",
        resource="memory/document",
        quantities={"documents": 1},
        occurred_at=utcnow(),
    )
    tx.publish(USAGE_RECORDS, record, key=tenant_id)
