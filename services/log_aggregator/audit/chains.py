"""The audit chains in PostgreSQL: one per tenant, and the system's chain, whose tenant id is empty."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from infra.postgres.database import Database
from infra.postgres.tx import Tx
from protos.messages.audit import ActAudited
from services.log_aggregator.audit import domain
from services.log_aggregator.audit.domain import EMPTY, ChainHead, Link

# Number of records that are read and verified at a time.
BATCH = 1000
# After each batch, so that the verification of a long chain leaves the process to others.
PAUSE_SECONDS = 0.02


class Verification(NamedTuple):
    """The result of verifying a chain."""

    records: int
    """Number of valid records before the break, or of all records."""
    head: bytes
    broken_at: int | None
    """The seq of the first changed or missing record. None if the chain is intact."""


def record(act: ActAudited, headers: Mapping[str, str]) -> str:
    """Returns the record of an act for the chain, with the id and the sender of its message."""
    fields = {
        "id": headers["ce_id"],
        "service": headers.get("ce_source", ""),
        "tenant_id": act.tenant_id,
        "at": act.at.astimezone(UTC).isoformat(),
        "actor": act.actor,
        "action": act.action,
        "object_kind": act.object_kind,
        "object_id": act.object_id,
        "outcome": act.outcome,
        "details": act.details,
    }
    return domain.canonical(fields)


async def append(tx: Tx, chains: Mapping[str, Sequence[str]]) -> None:
    """Appends records to their chains (tenant id → records). The heads of the chains stay locked until the commit."""
    # Heads are locked in the order of their key. Two transactions that share chains would otherwise deadlock.
    tenants = sorted(chains)
    rows = await tx.sql(
        """
        INSERT INTO audit_head AS h (tenant_id, seq, hash) SELECT t, 0, $2 FROM unnest($1::text[]) AS n(t) ORDER BY t
        ON CONFLICT (tenant_id) DO UPDATE SET seq = h.seq RETURNING tenant_id, seq, hash
        """,
        tenants,
        EMPTY.hash,
    )
    added: list[tuple[str, Link]] = []
    heads: list[Link] = []
    for tenant_id, seq, hash_ in rows:
        links = list(domain.chained(ChainHead(seq, hash_), chains[tenant_id]))
        added += [(tenant_id, link) for link in links]
        heads.append(links[-1])
    read = [_searched(link.record) for _, link in added]
    await tx.sql(
        """
        INSERT INTO audit_record (tenant_id, seq, at, actor, action, object_id, record, hash) SELECT * FROM unnest(
        $1::text[], $2::bigint[], $3::timestamptz[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bytea[])
        """,
        [tenant_id for tenant_id, _ in added],
        [link.seq for _, link in added],
        *(list(column) for column in zip(*read, strict=True)),
        [link.record for _, link in added],
        [link.hash for _, link in added],
    )
    await tx.sql(
        """
        UPDATE audit_head h SET seq = n.seq, hash = n.hash FROM unnest($1::text[], $2::bigint[], $3::bytea[])
        AS n(tenant_id, seq, hash) WHERE h.tenant_id = n.tenant_id
        """,
        [tenant_id for tenant_id, _, _ in rows],
        [link.seq for link in heads],
        [link.hash for link in heads],
    )


async def verify(database: Database, tenant_id: str) -> Verification:
    """Recomputes the hashes of a chain from its first record to its current head: at most 50,000 records a second."""
    async with database.begin(tenant_id=tenant_id or None) as tx:
        # In one statement, so that a record that is added meanwhile does not look like a record beyond the head.
        [(seq, hash_, last)] = await tx.sql(
            """
            SELECT coalesce(max(h.seq), 0), (array_agg(h.hash))[1],
            (SELECT coalesce(max(r.seq), 0) FROM audit_record r WHERE r.tenant_id = $1)
            FROM audit_head h WHERE h.tenant_id = $1
            """,
            tenant_id,
        )
    head = ChainHead(seq, hash_ or EMPTY.hash)
    good = EMPTY
    while good.seq < head.seq:
        async with database.begin(tenant_id=tenant_id or None) as tx:
            rows = await tx.sql(
                """
                SELECT seq, record, hash, at, actor, action, object_id FROM audit_record
                WHERE tenant_id = $1 AND seq > $2 AND seq <= $3 ORDER BY seq LIMIT $4
                """,
                tenant_id,
                good.seq,
                head.seq,
                BATCH,
            )
        links = [Link(*row[:3]) for row in rows]
        broken = domain.first_break(good, links)
        # The columns for the search must agree with the record, or a search would not find the record.
        sound = [row for row in rows if broken is None or row[0] < broken]
        mismatch = next((row[0] for row in sound if _searched(row[1]) != row[3:]), None)
        if breaks := [seq for seq in (broken, mismatch, None if rows else good.seq + 1) if seq]:
            return Verification(min(breaks) - 1, head.hash, min(breaks))
        good = ChainHead(links[-1].seq, links[-1].hash)
        await asyncio.sleep(PAUSE_SECONDS)
    if good != head:
        # The head was changed, or the last record together with its hash.
        return Verification(good.seq - 1, head.hash, good.seq)
    if last > head.seq:
        return Verification(head.seq, head.hash, head.seq + 1)
    return Verification(good.seq, head.hash, None)


async def has(database: Database, tenant_id: str, head: ChainHead) -> bool:
    """True if the chain has this record."""
    if head.seq == 0:
        return head == EMPTY
    return not await lacking(database, tenant_id, [head])


async def lacking(database: Database, tenant_id: str, heads: Sequence[ChainHead]) -> list[ChainHead]:
    """Returns those of `heads` whose record the chain does not have. None of them is the head of an empty chain."""
    async with database.begin(tenant_id=tenant_id or None) as tx:
        rows = await tx.sql(
            """
            SELECT seq, hash FROM audit_record WHERE tenant_id = $1 AND seq = ANY($2::bigint[])
            """,
            tenant_id,
            [head.seq for head in heads],
        )
    there = {(seq, bytes(hash_)) for seq, hash_ in rows}
    return [head for head in heads if head not in there]


async def listed(
    database: Database,
    tenant_id: str,
    wanted: Mapping[str, str],
    since: datetime | None,
    before: int | None,
    limit: int,
) -> list[dict[str, Any]]:
    """Returns the records of a chain, newest first, whose action, actor and object_id match `wanted`."""
    # A condition of its own, so that it can use the index of the time.
    recent = "AND at >= $7" if since else ""
    async with database.begin(tenant_id=tenant_id or None) as tx:
        rows = await tx.sql(
            f"""
            SELECT seq, record, hash FROM audit_record WHERE tenant_id = $1
            AND ($2::text IS NULL OR action = $2) AND ($3::text IS NULL OR actor = $3)
            AND ($4::text IS NULL OR object_id = $4)
            AND ($5::bigint IS NULL OR seq < $5) {recent} ORDER BY seq DESC LIMIT $6
            """,
            tenant_id,
            *(wanted.get(name) for name in ("action", "actor", "object_id")),
            before,
            limit,
            *([since] if since else []),
        )
    return [{"seq": seq, **json.loads(text), "hash": hash_.hex()} for seq, text, hash_ in rows]


def _searched(text: str) -> tuple[datetime, str, str, str]:
    read = json.loads(text)
    return datetime.fromisoformat(read["at"]), read["actor"], read["action"], read["object_id"]
