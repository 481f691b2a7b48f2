"""``./claw run show``: the timeline of one run, from the incoming message to the charge."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import asyncpg
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infra.errors import NotFound
from tooling.cli.client import gateway
from tooling.stack.home import Home, home_folder
from tooling.stack.operator import printable

app = typer.Typer(no_args_is_help=True, help="Show the runs of agents.")


@app.callback()
def _group() -> None:
    """Without this function, a group with one command would lose the command's name."""


@app.command()
def show(
    id: Annotated[UUID, typer.Argument(help="The run's id.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show a run's timeline: message, steps, calls, reply, delivery, usage, charge."""
    found = asyncio.run(_find(id))
    if as_json:
        print(json.dumps(found))  # noqa: T201
    else:
        draw(Console(highlight=False), found["run"], found["timeline"])


async def _find(id_: UUID) -> dict[str, Any]:
    access = Home(home_folder()).credentials()
    connection = await asyncpg.connect(access["engines"]["postgres"]["url"])
    try:
        tenant_id = await connection.fetchval("SELECT tenant_id FROM agent.run WHERE id = $1", id_)
    finally:
        await connection.close()
    if tenant_id is None:
        raise NotFound(f"run {id_}: does not exist in this stack")
    async with gateway(access["base_url"], access["admin_token"], tenant_id=tenant_id) as api:
        run = await api.get(f"/api/v1/runs/{id_}")
        timeline = await api.get(f"/api/v1/runs/{id_}/timeline")
    return {"run": run, "timeline": timeline["items"]}


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


def money(nanos: int, currency: str) -> str:
    """The exact amount as text: up to nine decimals without trailing zeros, at least two."""
    whole, part = divmod(abs(nanos), 1_000_000_000)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanos < 0 else ''}{whole}.{decimals} {currency}"
