"""``./claw run show``: the timeline of one run, from the incoming message to the charge."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.errors import NotFound
from tooling.cli.client import Gateway, gateway
from tooling.stack.home import Home, home_folder
from tooling.stack.operator import printable

app = typer.Typer(no_args_is_help=True, help="Show the runs of agents.")


@app.callback()
def _group() -> None:
    """Without this function, a group with one command would lose the command's name."""


@app.command()
def show(
    id: Annotated[UUID, typer.Argument(help="The run's id.")],
    at: Annotated[
        int | None, typer.Option(min=1, help="The number of an event: show the run's state after it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a run's timeline: message, steps, calls, reply, delivery, usage, charge."""
    found = asyncio.run(_find(id) if at is None else _state(id, at))
    if at is not None and not as_json:
        draw_state(Console(highlight=False), found)
    elif as_json:
        print(json.dumps(found))  # noqa: T201
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
    access = Home(home_folder()).credentials()
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
        text = (
            f"step {step['n']}: {step['kind']} {printable(step['name'])}, {step['status']}, attempt {step['attempt']}"
        )
        console.print(Text(text + (f": {printable(step['error'])}" if step["error"] else "")), soft_wrap=True)
    console.print(f"{state['tokens']} tokens; started {state['attempts']} times")
    console.print(f'A fork from here has "step": {state["fork_step"]}: POST /api/v1/runs/ID/fork', style="dim")


def money(nanos: int, currency: str) -> str:
    """The exact amount as text: up to nine decimals without trailing zeros, at least two."""
    whole, part = divmod(abs(nanos), 1_000_000_000)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{decimals} {currency}"
