"""The columns of runs, steps and sessions that follow from events and from usage. Their writers are
`runs.projections`, the SQL function `write_runs` and `sessions.intake`; the folds here make the same rows again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from infra.postgres.read_models import ReadModel, Recorded, folded_read_model, rebuilt_by_query
from services.agent.runs import events
from services.agent.runs.publishing import RUN
from services.agent.sessions.domain import Session, evolve
from services.agent.sessions.events import MessageAccepted
from services.agent.sessions.publishing import SESSION


def run(run_id: str, journal: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    row: dict[str, Any] = {"id": run_id, "status": "queued", "reply": None, "error": None, "calls": None}
    for event, *_ in journal:
        match event:
            case events.RunStarted():
                row["status"] = "running"
            case events.RunSuspended(reason="indeterminate"):
                row |= {"status": "indeterminate", "error": event.text}
            case events.RunSuspended():
                row |= {"status": "waiting", "error": None}
            case events.StepSettled():
                row |= {"status": "queued", "error": None}
            case events.RunCompleted():
                row |= {"status": "completed", "reply": event.reply, "calls": event.calls}
            case events.RunFailed():
                row |= {"status": event.status, "error": event.error}
    yield row


def steps(run_id: str, journal: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for event, tenant_id, at in journal:
        match event:
            case events.StepStarted():
                new = {"tenant_id": tenant_id, "run_id": run_id, "n": event.step, "kind": event.kind}
                row = rows.setdefault(event.step, {**new, "name": event.name, "duration_ms": None, "error": None})
                row |= {"status": "running", "attempts": event.attempt, "started_at": at}
            case events.StepCompleted():
                rows[event.step] |= {
                    "status": event.status,
                    "duration_ms": event.duration_ms,
                    "error": event.error,
                }
    yield from rows.values()


def session(stream_id: str, history: Sequence[Recorded]) -> Iterator[Mapping[str, Any]]:
    state = Session()
    for event, *_ in history:
        state = evolve(state, event)
    tenant_id, _, session_key = stream_id.partition("/")
    yield {
        "tenant_id": tenant_id,
        "session_key": session_key,
        "messages": sum(isinstance(event, MessageAccepted) for event, *_ in history),
        "run_id": state.run_id,
        "run_messages": state.messages,
        "run_waits": state.waits,
    }


_FIGURES = ("input_tokens", "cached_tokens", "output_tokens")

READ_MODELS = (
    folded_read_model(
        RUN,
        run,
        name="runs",
        table="run",
        key=("id",),
        columns=("status", "reply", "error", "calls"),
        stream="l.id::text",
        in_scope="l.id = ANY($1::text[]::uuid[])",
        empty="l.status = 'queued'",
        whole=False,
    ),
    folded_read_model(
        RUN,
        steps,
        name="steps",
        table="run_step",
        key=("run_id", "n"),
        columns=("tenant_id", "kind", "name", "status", "attempts", "duration_ms", "error"),
        stream="l.run_id::text",
        in_scope="l.run_id = ANY($1::text[]::uuid[])",
        new=("started_at",),
    ),
    folded_read_model(
        SESSION,
        session,
        name="sessions",
        table="session",
        key=("tenant_id", "session_key"),
        columns=("messages", "run_id", "run_messages", "run_waits"),
        stream="l.tenant_id || '/' || l.session_key",
        in_scope="""
            (l.tenant_id, l.session_key) IN (
                SELECT split_part(s, '/', 1), substr(s, strpos(s, '/') + 1) FROM unnest($1::text[]) AS n(s)
            )
        """,
        empty="l.messages = 0",
    ),
    ReadModel(
        name="tokens",
        table="run",
        key=("id",),
        columns=_FIGURES,
        scopes="""
            SELECT id::text FROM run
            WHERE id > coalesce(nullif($1, ''), '00000000-0000-0000-0000-000000000000')::uuid
            ORDER BY id LIMIT $2
        """,
        total="SELECT count(*) FROM run",
        # Each row of usage refers to its run.
        strays="SELECT ''::text LIMIT 0 * $1::int",
        in_scope="l.id = ANY($1::text[]::uuid[])",
        # A figure that was never reported stays null.
        rebuild=rebuilt_by_query(
            f"""
            SELECT run.id, {", ".join(f"sum((u.quantities::jsonb->>'{f}')::bigint)::bigint AS {f}" for f in _FIGURES)}
            FROM run LEFT JOIN run_usage AS u ON u.run_id = run.id
            WHERE run.id = ANY($1::text[]::uuid[])
            GROUP BY run.id
            """
        ),
        whole=False,
    ),
)
