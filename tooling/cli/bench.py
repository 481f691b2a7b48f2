"""``./claw bench``: measures the kernel on engines of its own, as ratios to hand-written code for the same work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.table import Table

from infra.observe import logs
from tooling.bench.protocol import Figure, Latency, Result
from tooling.bench.record import machine, record
from tooling.bench.run import BENCHES, ENGINES, ON_DEMAND, run
from tooling.cli.output import Progress
from tooling.stack.engines.base import EngineError
from tooling.testing.stack import running_stack


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(help=f"The benches: {', '.join(BENCHES)}. Default: all except {', '.join(ON_DEMAND)}."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each result.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Record the figures in BENCHMARKS.md.")] = False,
) -> None:
    """Measure throughput and latency. Takes minutes. Exit code 1 if a goal is missed."""
    chosen = names or [name for name in BENCHES if name not in ON_DEMAND]
    if unknown := [name for name in chosen if name not in BENCHES]:
        raise EngineError(f"bench {', '.join(unknown)}: unknown, must be one of {', '.join(BENCHES)}")
    # Stand-ins serve in this process. Otherwise a log line for each of their requests would mix with the results.
    logs.setup("bench", "error")
    where = machine()
    found: dict[str, Sequence[Figure]] = {}
    with Progress() as progress:
        progress.show("start engines")
        with running_stack(ENGINES) as stack:
            for name in chosen:
                progress.show(f"prepare {name}")
                found[name] = uvloop.run(run(name, stack, partial(progress.count, f"slices of {name}")))
    if write:
        record(found, " ".join(["./claw bench", *(names or []), "--write"]), where)
    results = [figure for figures in found.values() for figure in figures]
    if json:
        for result in results:
            print(msgspec.json.encode(result).decode())  # noqa: T201
    else:
        Console(highlight=False).print(render(results))
    if not all(result.met for result in results):
        raise typer.Exit(1)


def render(results: list[Figure]) -> Table:
    """The results as a table of 80 columns."""
    table = Table(
        "bench", "against", "ours", "95 %", "goal", "rates per second", "", box=None, pad_edge=False, width=80
    )
    for result in results:
        if isinstance(result, Result):
            verdict = "[yellow]void[/]" if result.void else "[green]met[/]" if result.met else "[red]missed[/]"
            table.add_row(
                result.bench,
                result.anchor,
                f"{result.ratio:.2f}×",
                f"{result.low:.2f}–{result.high:.2f}",
                f"≥ {result.goal:g}×",
                f"{result.our_rate:,.0f} to {result.anchor_rate:,.0f}",
                verdict,
            )
        elif isinstance(result, Latency):
            verdict = "[green]met[/]" if result.met else "[red]missed[/]"
            table.add_row(
                result.bench,
                result.measure,
                f"{result.p99_ms:.0f} ms",
                f"p50 {result.p50_ms:.0f}",
                f"≤ {result.goal_ms:g} ms",
                f"at {result.rate:,.0f}",
                verdict,
            )
        else:
            verdict = "" if result.goal is None else "[green]met[/]" if result.met else "[red]missed[/]"
            table.add_row(
                result.bench,
                result.measure,
                f"{result.value:.1f} {result.unit}",
                "" if result.low is None else f"{result.low:.1f}–{result.high:.1f}",
                "" if result.goal is None else f"≤ {result.goal:g} {result.unit}",
                ", ".join(f"{name} {round(figure, 2):,}" for name, figure in result.made_of.items()),
                verdict,
            )
    return table
