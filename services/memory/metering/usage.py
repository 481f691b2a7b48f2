"""Reports every embedding call, every list that was ordered again, and every indexed document to billing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple
from uuid import UUID

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded

DOCUMENT = "memory/document"
# Room for the tokens that a model server puts around a text.
_TOKENS_AROUND = 100


class UseSource(NamedTuple):
    """The source of a use: the scopes of budgets, and the groups of reports. Empty: unknown."""

    agent_id: str = ""
    channel_id: str = ""
    session_key: str = ""
    api_key_id: str = ""
    member_id: str = ""
    tag: str = ""


UNKNOWN = UseSource()


def of_client(actor: str, *, channel_id: UUID | None = None, session_key: str = "") -> UseSource:
    """`actor`: ``api_key:<id>`` or ``member:<id>``; any other one is not named."""
    kind, _, id_ = actor.partition(":")
    return UseSource(
        channel_id=str(channel_id or ""),
        session_key=session_key,
        api_key_id=id_ if kind == "api_key" else "",
        member_id=id_ if kind == "member" else "",
    )


def embedding(model: str) -> str:
    return f"embedding/{model}"


def reranking(model: str) -> str:
    return f"rerank/{model}"


def reported(usage: Any, name: str, most: int) -> float | None:
    """A count that a model server reports, from 1 to `most`. Anything else counts as not reported: it would be
    billed, or billing would refuse the whole record."""
    count = usage.get(name) if isinstance(usage, dict) else None
    if not isinstance(count, int | float) or isinstance(count, bool):
        return None
    return count if 0 < count <= most else None


def most_tokens(texts: Sequence[str]) -> int:
    """No model has more tokens than bytes."""
    return sum(len(text.encode()) + _TOKENS_AROUND for text in texts)


def record_usage(
    tx: Tx,
    model: str,
    usage_id: str,
    tokens: int,
    origin: UseSource,
    hold_id: UUID | None = None,
    *,
    estimated: bool = False,
) -> None:
    """Records that the tenant of `tx` had `tokens` embedded by `model`. `usage_id` is unique per attempt."""
    _record(tx, usage_id, embedding(model), {"input_tokens": tokens}, origin, hold_id, estimated=estimated)


def record_reranking(tx: Tx, model: str, usage_id: str, quantities: dict[str, int], origin: UseSource) -> None:
    """Records that `model` ordered passages for a search of the tenant."""
    _record(tx, usage_id, reranking(model), quantities, origin, None)


def document_hold(id_: UUID) -> UUID:
    """The hold for a document, or for one version of it. Its record of usage closes it."""
    # Not of "document" alone: a hold of an earlier release has this id and names no origin, and billing refuses another
    # request with its id.
    return derived_id(id_, "document", "origin")


def record_document(tx: Tx, id_: UUID, origin: UseSource) -> None:
    """Records that a document, or one version of it, was indexed."""
    _record(tx, f"document/{id_}", DOCUMENT, {"documents": 1}, origin, document_hold(id_))


def _record(
    tx: Tx,
    usage_id: str,
    resource: str,
    quantities: dict[str, int],
    origin: UseSource,
    hold_id: UUID | None,
    *,
    estimated: bool = False,
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
        agent_id=_uuid(origin.agent_id),
        channel_id=_uuid(origin.channel_id),
        session_key=origin.session_key or None,
        api_key_id=origin.api_key_id or None,
        member_id=_uuid(origin.member_id),
        tag=origin.tag or None,
    )
    tx.publish(USAGE_RECORDS, record, key=tenant_id)


def _uuid(text: str) -> UUID | None:
    """A name that is none of our ids is not reported."""
    with suppress(ValueError):
        return UUID(text)
    return None
