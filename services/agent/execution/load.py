"""Loads runs: rows, agents, journals, messages and keys of many runs with a few statements for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from uuid import UUID

from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.security.subjects import SubjectKeys
from services.agent.definitions import store
from services.agent.definitions.store import StoredAgent
from services.agent.execution.conversation import (
    PARENT_MESSAGES,
    Conversation,
    ExchangeRow,
    MessageRow,
    SessionSummary,
    SummaryRow,
    TenantKeys,
    assemble,
    open_summary,
)
from services.agent.runs import projections
from services.agent.runs.domain import Run, evolve
from services.agent.runs.publishing import RUN

# How many of the newest messages of a session are read.
MOST_MESSAGES = 400

# Reads only; it locks nothing. The journal and the messages come from one snapshot.
_RUNS = """
SELECT r.id, r.tenant_id, r.session_key, r.agent_id, r.subject_id, r.channel_id, r.status, r.cancel_reason, r.depth,
       r.limit_nanos, r.parent_run_id,
       e.types, e.versions, e.data,
       m.seqs, m.ids, m.subjects, m.texts, m.conversations, m.vendor_ids, m.contexts,
       s.summary, s.summary_subject, s.summary_about, s.summary_seq, s.parent_key, s.parent_seq,
       a.id, a.tenant_id, v.version, a.enabled, v.definition, v.api_key, v.fallback_key, a.created_at, v.created_at,
       k.subjects, k.keys, d.seq, d.vendor_message_id
FROM run r
    CROSS JOIN LATERAL (
        SELECT array_agg(type ORDER BY version) AS types, array_agg(schema_version ORDER BY version) AS versions,
               array_agg(data ORDER BY version) AS data
        FROM event
        WHERE stream_id = 'run:' || r.id
    ) e
    CROSS JOIN LATERAL (
        SELECT array_agg(seq ORDER BY seq) AS seqs, array_agg(message_id ORDER BY seq) AS ids,
               array_agg(subject_id ORDER BY seq) AS subjects, array_agg(text ORDER BY seq) AS texts,
               array_agg(conversation ORDER BY seq) AS conversations,
               array_agg(vendor_message_id ORDER BY seq) AS vendor_ids, array_agg(context ORDER BY seq) AS contexts
        FROM message
        WHERE run_id = r.id AND NOT decides
    ) m
    LEFT JOIN session s ON s.tenant_id = r.tenant_id AND s.session_key = r.session_key
    LEFT JOIN agent a ON a.id = r.agent_id AND a.tenant_id = r.tenant_id
    LEFT JOIN agent_version v ON v.agent_id = a.id AND v.version = a.version
    CROSS JOIN LATERAL (
        SELECT array_agg(subject_id ORDER BY subject_id) AS subjects, array_agg(wrapped ORDER BY subject_id) AS keys
        FROM subject_key
        WHERE tenant_id = r.tenant_id
            AND subject_id = ANY(ARRAY[r.subject_id, s.summary_subject] || m.subjects || s.summary_about)
    ) k
    LEFT JOIN LATERAL (
        SELECT seq, vendor_message_id
        FROM message
        WHERE run_id = r.id AND decides AND vendor_message_id IS NOT NULL
        ORDER BY seq DESC
        LIMIT 1
    ) d ON true
WHERE r.id = ANY((SELECT $1::uuid[])::uuid[])
"""
_EARLIER = """
SELECT n.run_id, n.is_parent, h.*
FROM unnest((SELECT $1::uuid[]), $2::boolean[], $3::text[], $4::text[], $5::bigint[], $6::bigint[], $7::bigint[])
        AS n(run_id, is_parent, tenant_id, session_key, after_seq, before_seq, most)
    CROSS JOIN LATERAL (
        SELECT m.run_id, m.seq, m.message_id, m.subject_id, m.text, r.subject_id, r.reply, m.is_answer
        FROM message m JOIN run r ON r.id = m.run_id
        WHERE m.tenant_id = n.tenant_id AND m.session_key = n.session_key AND m.seq > n.after_seq
            AND m.seq < n.before_seq AND NOT m.decides
        ORDER BY m.seq DESC
        LIMIT n.most
    ) h(run_id, seq, message_id, subject_id, text, reply_subject_id, reply, is_answer)
ORDER BY n.run_id, n.is_parent, h.seq
"""


@dataclass(frozen=True)
class RunRow:
    """The row of a run under execution."""

    id: UUID
    tenant_id: str
    session_key: str
    agent_id: UUID
    subject_id: str
    channel_id: UUID | None
    """None if the run came by the API."""
    status: str
    cancel_reason: str | None
    depth: int
    limit_nanos: int | None
    parent_run_id: UUID | None

    @property
    def is_over(self) -> bool:
        return self.status not in projections.STOPPABLE

    @property
    def log_fields(self) -> dict[str, str]:
        """Fields by which log lines are searched. The tenant sees lines that name it."""
        channel = {"channel_id": str(self.channel_id)} if self.channel_id else {}
        return {"tenant": self.tenant_id, "run_id": str(self.id), **channel}


class Decision(NamedTuple):
    """A message by which a person decided."""

    seq: int
    vendor_message_id: str


@dataclass(frozen=True)
class LoadedRun:
    """A run and everything that its execution starts from."""

    row: RunRow
    state: Run
    messages: Sequence[MessageRow]
    agent: StoredAgent | None
    """The newest version; None if there is no such agent."""
    summary: SessionSummary | None
    earlier: Sequence[ExchangeRow]
    of_parent: Sequence[ExchangeRow]
    """The last messages of the parent session; empty if there is none."""
    keys: TenantKeys
    decision: Decision | None
    """The last message of a person that decided about a call of the run; None if there is none."""

    @property
    def only_speaker(self) -> str | None:
        """The person who said everything that the run answers; None for several people, and for another agent."""
        speakers = {message.subject_id for message in self.messages}
        return speakers.pop() if len(speakers) == 1 and not self.row.parent_run_id else None

    def conversation(self, shown: int) -> Conversation:
        """The conversation with the first `shown` messages. Raises Erased if all their authors were erased."""
        messages = self.messages[:shown]
        conversation = assemble(messages, self.summary, self.earlier, self.of_parent, self.keys)
        if self.decision and self.decision.seq > messages[-1].seq:
            # A vendor may take one answer to each message, and for a while only.
            return replace(conversation, reply_to=self.decision.vendor_message_id)
        return conversation


async def load_runs(tx: Tx, subjects: SubjectKeys, run_ids: Sequence[UUID]) -> dict[UUID, LoadedRun]:
    """The runs by their ids. A run that does not exist is left out."""
    rows = [_Row(row) for row in await tx.sql(_RUNS, list(run_ids))]
    known = {subject: subjects.opened(subject, key) for row in rows for subject, key in row.keys.items()}
    if unknown := {subject for row in rows for subject in row.subjects()} - known.keys():
        known |= await subjects.keys(tx, unknown)
    for row in rows:
        row.open_summary(known)
    found: dict[tuple[UUID, bool], list[ExchangeRow]] = {}
    if wanted := [part for row in rows for part in row.earlier_parts()]:
        for run_id, is_parent, *values in await tx.sql(_EARLIER, *map(list, zip(*wanted, strict=True))):
            found.setdefault((run_id, is_parent), []).append(ExchangeRow(*values))
        tenants = {row.run.id: row.run.tenant_id for row in rows}
        of_earlier = {
            (tenants[run_id], subject)
            for (run_id, _), earlier in found.items()
            for exchange in earlier
            for subject in (exchange.subject_id, exchange.reply_subject_id)
        }
        known |= await subjects.keys(tx, of_earlier - known.keys())
    return {
        row.run.id: LoadedRun(
            row.run,
            row.state,
            row.messages,
            row.agent,
            row.summary,
            found.get((row.run.id, False), ()),
            found.get((row.run.id, True), ()),
            TenantKeys(row.run.tenant_id, known),
            row.decision,
        )
        for row in rows
    }


class _Row:
    """One row of `_RUNS`, taken apart."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.run = RunRow(*values[:11])
        self.state = Run()
        for name, version, data in zip(*(column or () for column in values[11:14]), strict=True):
            self.state = evolve(self.state, RUN.events.decode(name, version, data))
        self.messages = [
            MessageRow(*message) for message in zip(*(column or () for column in values[14:21]), strict=True)
        ]
        self._summary = SummaryRow(*values[21:25]) if values[21] else None
        self.summary: SessionSummary | None = None
        self._parent = values[25:27] if values[25] and values[26] else None
        self.agent = store.stored(values[27:36]) if values[27] else None
        stored = zip(*(column or () for column in values[36:38]), strict=True)
        self.keys = {(self.run.tenant_id, subject): key for subject, key in stored}
        """Person → the stored key, of those that have a row."""
        self.decision = Decision(*values[38:40]) if values[38] else None

    def subjects(self) -> set[tuple[str, str]]:
        found = {self.run.subject_id, *(message.subject_id for message in self.messages)}
        if self._summary:
            found |= {self._summary.subject_id, *self._summary.about}
        return {(self.run.tenant_id, subject) for subject in found}

    def earlier_parts(self) -> list[tuple[Any, ...]]:
        """The arguments of `_EARLIER` for this run, if it continues a session or branched off from one."""
        parts: list[tuple[Any, ...]] = []
        run = self.run
        if self.messages and self.messages[0].seq > 1:
            after = self.summary.seq if self.summary else 0
            parts.append((run.id, False, run.tenant_id, run.session_key, after, self.messages[0].seq, MOST_MESSAGES))
        if self._parent:
            parent_key, parent_seq = self._parent
            parts.append((run.id, True, run.tenant_id, parent_key, 0, parent_seq + 1, PARENT_MESSAGES))
        return parts

    def open_summary(self, known: Mapping[tuple[str, str], Any]) -> None:
        if self._summary and self.messages and self._summary.seq < self.messages[0].seq:
            self.summary = open_summary(self._summary, self.run.session_key, TenantKeys(self.run.tenant_id, known))


class RunLoader:
    """Loads the runs that are asked for in the same turn of the event loop together.

    A worker that claims many lanes starts their runs in one turn, so it loads them with the statements of one run.
    """

    def __init__(self, database: Database, subjects: SubjectKeys) -> None:
        self._database = database
        self._subjects = subjects
        self._waiting: dict[UUID, asyncio.Future[LoadedRun]] = {}
        self.working: asyncio.Task[None] | None = None
        """The task that loads the latest runs; None before the first."""

    async def load(self, run_id: UUID) -> LoadedRun:
        """Raises KeyError if there is no such run."""
        if run_id not in self._waiting:
            if not self._waiting:
                # An empty context: it works for many tenants, and must not wait for the share of one.
                self.working = asyncio.create_task(self._load(), name="load runs", context=Context())
            self._waiting[run_id] = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._waiting[run_id])

    async def _load(self) -> None:
        waiting, self._waiting = self._waiting, {}
        try:
            async with self._database.read_only(tenant_id="") as tx:
                loaded = await load_runs(tx, self._subjects, list(waiting))
        except Exception as error:
            for future in waiting.values():
                future.set_exception(error)
                future.exception()  # The worker that asked may be gone.
            return
        for run_id, future in waiting.items():
            if run_id in loaded:
                future.set_result(loaded[run_id])
            else:
                future.set_exception(KeyError(run_id))
                future.exception()
