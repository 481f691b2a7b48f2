"""Reports every embedding call, every list that was ordered again, and every indexed document to billing."""

from __future__ import annotations

from uuid import UUID

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded

DOCUMENT = "memory/document"


def embedding(model: str) -> str:
    return f"embedding/{model}"


def reranking(model: str) -> str:
    return f"rerank/{model}"


def record_usage(
    tx: Tx, model: str, usage_id: str, tokens: int, hold_id: UUID | None = None, *, estimated: bool = False
) -> None:
    """Records that the tenant of `tx` had `tokens` embedded by `model`. `usage_id` is unique per attempt."""
    _record(tx, usage_id, embedding(model), {"input_tokens": tokens}, hold_id, estimated=estimated)


def record_reranking(tx: Tx, model: str, usage_id: str, quantities: dict[str, int]) -> None:
    """Records that `model` ordered passages for a search of the tenant."""
    _record(tx, usage_id, reranking(model), quantities, None)


def document_hold(id_: UUID) -> UUID:
    """The hold for a document, or for one version of it. Its record of usage closes it."""
    return derived_id(id_, "document")


def record_document(tx: Tx, id_: UUID) -> None:
    """Records that a document, or one version of it, was indexed."""
    _record(tx, f"document/{id_}", DOCUMENT, {"documents": 1}, document_hold(id_))


def _record(
    tx: Tx, usage_id: str, resource: str, quantities: dict[str, int], hold_id: UUID | None, *, estimated: bool = False
) -> None:
    tenant_id = tx.tenant_id
    assert tenant_id is not None
    record = UsageRecorded(
        tenant_id=tenant_id,
        usage_id=usage_id,
        resource=resource,
        quantities=quantities,
        occurred_at=utcnow(),
        estimated=estimated,
        hold_id=hold_id,
    )
    tx.publish(USAGE_RECORDS, record, key=tenant_id)
