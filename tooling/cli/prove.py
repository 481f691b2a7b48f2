"""``./claw prove``: kills services and engines at random under load, and shows that no message was lost or doubled."""

from __future__ import annotations

import asyncio
import random
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from infra.observe import logs
from tooling.testing.campaign import Campaign, Report
from tooling.testing.model_server import model_server
from tooling.testing.stack import private_home, run_claw
from tooling.testing.system import System
from tooling.testing.vendors import WebhookStandIn

out = Console(highlight=False)


def prove(
    kills: Annotated[int, typer.Option(min=0, help="How many processes are killed.")] = 20,
    seed: Annotated[int | None, typer.Option(help="The same seed kills the same parts at the same pauses.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Print the whole report as one JSON document.")] = False,
) -> None:
    """Kill services and engines at random under load. Exit code 1 if a message is lost, doubled or billed wrong."""
    logs.setup("prove", "error")
    chosen = random.randrange(2**32) if seed is None else seed
    console = Console(stderr=True, highlight=False)
    with private_home() as home:
        console.print("Starting a system of its own: all engines and services.")
        run_claw(home, "up")
        found = asyncio.run(_prove(System.at(home), kills, chosen, console))
    if report:
        print(msgspec.json.encode(found).decode())  # noqa: T201
    else:
        show(found)
    if not found.held:
        raise typer.Exit(1)


async def _prove(system: System, kills: int, seed: int, console: Console) -> Report:
    async with model_server() as models, WebhookStandIn() as vendor:
        return await Campaign(system, models, vendor, seed).run(kills, console.print)


def show(found: Report) -> None:
    """Prints the result for a person."""
    out.print(f"{len(found.kills)} kills in {found.seconds:.0f} s, seed {found.seed}")
    failed = ", ".join(f"{reason} {times}" for reason, times in found.failed_attempts.items()) or "none"
    out.print(f"{found.accepted} messages accepted in {found.attempts} webhook calls; failed calls: {failed}")
    out.print(f"slowest reply after {found.slowest_seconds:.0f} s, {found.extra_model_calls} extra calls of the model")
    for name, faults in (
        ("lost", found.lost),
        ("answered twice", found.answered_twice),
        ("out of order", found.out_of_order),
        ("unexpected replies", found.unexpected),
        ("faults of the bill", found.bill),
    ):
        out.print(f"{'[red]✗[/]' if faults else '[green]✓[/]'} {name}: {len(faults)}", *faults[:10], sep="\n    ")
