"""HTTP of the audit chains."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from infra.errors import InvalidMessage
from infra.service.api import Paging, Viewer, page
from infra.service.one_each import OneEach
from infra.service.service import Runtime
from infra.web.times import Time
from services.log_aggregator import adapters
from services.log_aggregator.access import RequestedTenant
from services.log_aggregator.audit import chains, verification
from services.log_aggregator.audit.domain import ChainHead
from services.log_aggregator.audit.lines import AuditLines

# PostgreSQL's text cannot hold a NUL.
_Text = Annotated[str | None, Query(min_length=1, max_length=500, pattern=r"^[^\x00]*$")]


class StoredHeadsView(BaseModel):
    """The heads of the chain that are kept in the object store."""

    heads: int
    """Number of heads, each compared with the chain. The head of a chain that has grown is stored every hour."""
    newest: int
    """The seq of the newest one; 0 if there is none. The store proves nothing about later records."""
    mismatch_at: int | None
    """The seq of the first one that the chain does not have, or that this platform has not issued."""


class VerificationView(BaseModel):
    """The result of verifying a chain."""

    records: int
    """Number of valid records before the break, or of all records."""
    ok: bool
    head: str
    """Hash of the last record, hexadecimal."""
    broken_at: int | None
    """The seq of the first changed or missing record, if not `ok`."""
    line: str
    """Names the head of a chain that is `ok`, and proves that this platform has issued it; empty otherwise. Keep it
    outside of the platform: a later verification with it notices a chain that was rewritten as a whole."""
    stored: StoredHeadsView | None
    """Null if the object store does not answer; the chain was then compared with itself only."""


class AuditRecord(BaseModel):
    """A record of a chain."""

    seq: int
    """Position in the chain, from 1."""
    id: str
    service: str
    tenant_id: str | None
    at: datetime
    actor: str
    action: str
    object_kind: str
    object_id: str
    outcome: Literal["done", "denied", "failed"]
    details: dict[str, str]
    hash: str
    """SHA-256, hexadecimal, of the previous hash and the record's canonical JSON (all fields except seq and hash, keys
    sorted, no spaces, ASCII)."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["audit"])
    lines = AuditLines(runtime.worker, runtime.cipher)
    stored_heads = adapters.stored_heads(runtime)
    verifying = OneEach("another verification for you is under way", timedelta(seconds=5))

    @routes.get("/api/v1/audit")
    async def list_acts(
        tenant: RequestedTenant,
        paging: Paging,
        action: _Text = None,
        object_id: _Text = None,
        actor: _Text = None,
        since: Time | None = None,
    ) -> dict[str, Any]:
        """Lists audit records, newest first. The operator gets the system's chain, or with `tenant_id` a tenant's."""
        wanted = {"action": action, "object_id": object_id, "actor": actor}
        found = await chains.listed(
            runtime.request if tenant else runtime.worker,
            tenant or "",
            {name: value for name, value in wanted.items() if value},
            since,
            _seq(paging.after),
            paging.limit + 1,
        )
        return page([AuditRecord(**record) for record in found], paging, lambda record: str(record.seq))

    @routes.get("/api/v1/audit/verify")
    async def verify(
        who: Viewer,
        tenant: RequestedTenant,
        line: Annotated[str | None, Query(max_length=500, pattern=r"^[ -~]*$")] = None,
    ) -> VerificationView:
        """Recomputes every hash of the chain, and compares the heads that are kept in the object store with it. With
        the `line` of an earlier verification, also compares the record that was the head then. 429 while another
        verification of the chain by the caller's tenant is under way."""
        database, chain = runtime.request if tenant else runtime.worker, tenant or ""
        kept = await lines.read(chain, line) if line is not None else None
        with verifying.place(f"{who.tenant_id}/{chain}"):
            found, stored, broken_at = await verification.check(database, stored_heads, chain)
        if kept and not await chains.has(database, chain, kept):
            broken_at = min(kept.seq, broken_at or kept.seq)
        ok = broken_at is None
        head = ChainHead(found.records, found.head)
        return VerificationView(
            records=found.records if ok else min(found.records, (broken_at or 1) - 1),
            ok=ok,
            head=found.head.hex(),
            broken_at=broken_at,
            line=await lines.write(chain, head) if ok else "",
            stored=StoredHeadsView(**stored._asdict()) if stored else None,
        )

    return routes


def _seq(cursor: str | None) -> int | None:
    if cursor is not None and not (cursor.isdecimal() and len(cursor) < 19):
        raise InvalidMessage("cursor", "is not a valid cursor")
    return int(cursor) if cursor else None
