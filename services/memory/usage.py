"""Reports every embedding call, every list that was ordered again, and every indexed document to billing."""

from __future__ import annotations

from uuid import UUID

from infra.clock import utcnow
from infra.postgres.tx import Tx
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded


def record_usage(tx: Tx, model: str, usage_id: str, tokens: int, *, estimated: bool = False) -> None:
    """Records that the tenant of `tx` had `tokens` embedded by `model`. `usage_id` is unique per attempt."""
    _record(tx, usage_id, f"embedding/{model}", {"input_tokens": tokens}, estimated=estimated)


def record_reranking(tx: Tx, model: str, usage_id: str, quantities: dict[str, int]) -> None:
    """Records that `model` ordered passages for a search of the tenant."""
    _record(tx, usage_id, f"rerank/{model}", quantities)


def record_document(tx: Tx, id_: UUID) -> None:
    """Records that a document, or one version of it, was indexed."""
    _record(tx, f"document/{id_}", "memory/document", {"documents": 1})


def _record(tx: Tx, usage_id: str, resource: str, quantities: dict[str, int], *, estimated: bool = False) -> None:
    tenant_id = tx.tenant_id
    assert tenant_id is not None
    record = UsageRecorded(
        tenant_id=tenant_id,
        usage_id=usage_id,
        resource=resource,
        quantities=quantities,
        occurred_at=utcnow(),
        estimated=estimated,
    )
    tx.publish(USAGE_RECORDS, record, key=tenant_id)
