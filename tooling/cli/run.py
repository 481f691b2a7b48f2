"""``./claw run``: a list of runs with the time that each took, and the timeline of one run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.errors import NotFound
from tooling.cli.client import Gateway, gateway
from tooling.cli.output import Json, print_json, printable
from tooling.stack import operator

app = typer.Typer(no_args_is_help=True, help="Show the runs of agents.")


# The id of a run begins with the milliseconds of its time, so the primary key finds the runs of a time. A run that has
# not ended, and a reply that is not delivered, have taken the time until now.
_LIST = """
    WITH found AS (
        SELECT r.id, r.tenant_id, r.status, r.error, r.trace_id, m.received_at, r.started_at, r.finished_at,
            d.ended_at AS delivered_at, d.deliveries - d.ended > 0 AS delivering
        FROM agent.run AS r
        CROSS JOIN LATERAL (
            SELECT coalesce(min(received_at), r.created_at) AS received_at FROM agent.message WHERE run_id = r.id
        ) AS m
        CROSS JOIN LATERAL (
            SELECT max(ended_at) AS ended_at, count(*) AS deliveries, count(ended_at) AS ended
            FROM agent.delivery WHERE run_id = r.id
        ) AS d
        WHERE r.id >= $1 AND r.id < $2 AND ($3::text IS NULL OR r.tenant_id = $3)
    ), timed AS (
        SELECT *,
            coalesce(started_at, finished_at, now()) - received_at AS waited,
            CASE WHEN started_at IS NOT NULL THEN coalesce(finished_at, now()) - started_at END AS ran,
            CASE WHEN delivering THEN now() ELSE delivered_at END - finished_at AS sent
        FROM found
    )
    SELECT * FROM timed ORDER BY CASE WHEN $4 THEN waited + coalesce(ran, '0') + coalesce(sent, '0') END DESC, id DESC
    LIMIT $5
"""


@app.command("list")
def list_(
    since: Annotated[datetime | None, typer.Option(help="The first moment, local time. Default: a day ago.")] = None,
    until: Annotated[datetime | None, typer.Option(help="The last moment, local time. Default: now.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only runs of this tenant.")] = None,
    slowest: Annotated[bool, typer.Option("--slowest", help="The slowest first; otherwise the newest.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The maximum number of runs.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each run.")] = False,
) -> None:
    """List runs, with the seconds from the message to the run's start, to its end, and to the delivered reply."""
    end = operator.local_time("--until", until) if until else datetime.now(UTC) + timedelta(minutes=1)
    begin = operator.local_time("--since", since) if since else end - timedelta(days=1)
    rows = operator.run(_list(_first_id(begin), _first_id(end), tenant, slowest, limit))
    if as_json:
        for row in rows:
            print_json(row)
    else:
        draw_list(Console(highlight=False), rows)


def _first_id(at: datetime) -> UUID:
    """The smallest id of that time."""
    return UUID(int=max(0, round(at.timestamp() * 1000)) << 80)


async def _list(first: UUID, end: UUID, tenant: str | None, slowest: bool, limit: int) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(operator.engines_access()["postgres"]["url"])
    try:
        rows = await connection.fetch(_LIST, first, end, tenant, slowest, limit)
    finally:
        await connection.close()
    return [
        {
            "run_id": str(row["id"]),
            "tenant_id": row["tenant_id"],
            "status": row["status"],
            "error": row["error"],
            "trace_id": row["trace_id"],
            "received_at": row["received_at"].isoformat(),
            "seconds": {
                name: None if row[name] is None else row[name].total_seconds() for name in ("waited", "ran", "sent")
            },
        }
        for row in rows
    ]


def draw_list(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints one line for each run; 80 columns. Ids are whole, because they are copied."""
    if not rows:
        console.print("No runs in this period.")
        return
    table = Table(box=None, width=80, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for name in ("UTC", "run", "status"):
        # The only column that gives room.
        table.add_column(name, no_wrap=name != "status", overflow="fold")
    for name in ("wait s", "run s", "send s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        seconds = ("" if value is None else f"{value:.{int(value < 1000)}f}" for value in row["seconds"].values())
        table.add_row(row["received_at"][5:16].replace("T", " "), row["run_id"], row["status"], *seconds)
    console.print(table)


@app.command()
def show(
    id: Annotated[UUID, typer.Argument(help="The run's id.")],
    at: Annotated[
        int | None, typer.Option(min=1, help="The number of an event: show the run's state after it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a run's timeline: message, steps, calls, reply, delivery, usage, charge."""
    found = operator.run(_find(id) if at is None else _state(id, at))
    if at is not None and not as_json:
        draw_state(Console(highlight=False), found)
    elif as_json:
        print_json(found)
    else:
        draw(Console(highlight=False), found["run"], found["timeline"])


async def _find(id_: UUID) -> dict[str, Any]:
    async with _gateway(id_) as api:
        run = await api.get(f"/api/v1/runs/{id_}")
        timeline = await api.get(f"/api/v1/runs/{id_}/timeline")
    return {"run": run, "timeline": timeline["items"]}


async def _state(id_: UUID, at: int) -> dict[str, Any]:
    async with _gateway(id_) as api:
        state: dict[str, Any] = await api.get(f"/api/v1/runs/{id_}/state", at=at)
    return state


@asynccontextmanager
async def _gateway(id_: UUID) -> AsyncIterator[Gateway]:
    """The gateway, as the administrator who acts for the run's tenant. Raises NotFound."""
    access = operator.access()
    connection = await asyncpg.connect(access["engines"]["postgres"]["url"])
    try:
        tenant_id = await connection.fetchval("SELECT tenant_id FROM agent.run WHERE id = $1", id_)
    finally:
        await connection.close()
    if tenant_id is None:
        raise NotFound(f"run {id_}: does not exist in this stack")
    async with gateway(access["base_url"], access["admin_token"], tenant_id=tenant_id) as api:
        yield api


def draw(console: Console, run: dict[str, Any], timeline: list[dict[str, Any]]) -> None:
    """Prints one line for each item, with the milliseconds since the first item; 80 columns."""
    console.print(f"run   {run['id']}  [bold]{run['status']}[/]\ntrace {run['trace_id']}")
    table = Table(box=None, width=80, padding=(0, 1), header_style="bold")
    table.add_column("at ms", justify="right", no_wrap=True)
    table.add_column("took ms", justify="right", no_wrap=True)
    table.add_column("service", no_wrap=True)
    table.add_column("event", no_wrap=True)
    table.add_column("", ratio=1, no_wrap=True, overflow="ellipsis")
    start = datetime.fromisoformat(timeline[0]["at"]) if timeline else None
    for item in timeline:
        assert start is not None
        offset = (datetime.fromisoformat(item["at"]) - start).total_seconds() * 1000
        took = "" if item["ms"] is None else f"{item['ms']:.0f}"
        summary = Text(printable(item["summary"]))
        table.add_row(f"+{offset:.0f}", took, item["service"], item["kind"], summary)
    console.print(table)
    usage = run["usage"]
    tokens = ", ".join(f"{name.removesuffix('_tokens')} {count}" for name, count in usage.items() if count is not None)
    cost = "not yet known" if run["cost_nanos"] is None else money(run["cost_nanos"], run["currency"])
    console.print(f"tokens: {tokens or 'not reported'}; cost: {cost}")
    if run.get("error"):
        console.print(Text(f"error: {printable(run['error'])}", "red"), soft_wrap=True)


def draw_state(console: Console, state: dict[str, Any]) -> None:
    """Prints the run's journal up to the event, and the state after it."""
    last = state["at"]
    console.print(f"run {state['run_id']} after event {last} of {len(state['events'])}: [bold]{state['status']}[/]")
    for event in state["events"][:last]:
        console.print(f"  {event['n']:>3}  {event['recorded_at']}  {event['type']}")
    for step in state["steps"]:
        # The retrieval of knowledge has no name.
        what = f"{step['kind']} {printable(step['name'])}".rstrip()
        text = f"step {step['n']}: {what}, {step['status']}, attempt {step['attempt']}"
        console.print(Text(text + (f": {printable(step['error'])}" if step["error"] else "")), soft_wrap=True)
    console.print(f"{state['tokens']} tokens; started {state['attempts']} times")
    console.print(f'A fork from here has "step": {state["fork_step"]}: POST /api/v1/runs/ID/fork', style="dim")


def money(nanos: int, currency: str) -> str:
    """The exact amount as text: up to nine decimals without trailing zeros, at least two."""
    whole, part = divmod(abs(nanos), 1_000_000_000)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{decimals} {currency}"
