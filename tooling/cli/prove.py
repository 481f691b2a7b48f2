"""``./claw prove``: faults at random under load, and invariants that show that no message was lost or doubled."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from infra.errors import describe
from infra.observe import logs
from tooling.bench.record import commit, machine
from tooling.cli.output import print_json
from tooling.stack.engines.base import EngineError
from tooling.testing.campaign import results
from tooling.testing.campaign.campaign import Campaign, Report, rigged
from tooling.testing.campaign.faults import FAULTS
from tooling.testing.campaign.mutants import CONTROL, MUTANTS, Result, try_one
from tooling.testing.model_server import model_server
from tooling.testing.stack import private_home, run_claw
from tooling.testing.system import System

out = Console(highlight=False)
_FAULTS = "\n\n".join(f"{name}: {kind.description}." for name, kind in FAULTS.items())


def prove(
    kills: Annotated[int, typer.Option(min=0, help="How many faults are injected.")] = 20,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same plan of faults.")] = None,
    faults: Annotated[str, typer.Option(help=f"The kinds, separated by commas. Default: all.\n\n{_FAULTS}")] = "",
    instances: Annotated[
        int, typer.Option(min=1, max=2, help="Processes of each service; with 2, each is killed.")
    ] = 1,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Try the system without each of its guards: the campaign must fail.")
    ] = False,
    report: Annotated[bool, typer.Option("--report", help="Write RESULTS.md, and the JSON in results/.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as one JSON document.")] = False,
) -> None:
    """Inject faults at random under load, on a system of its own. Exit code 1 if an invariant fails."""
    names = faults.split(",") if faults else list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        raise EngineError(f"--faults: {', '.join(unknown)} must be one of {', '.join(FAULTS)}")
    logs.setup("prove", "error")
    chosen = random.randrange(2**32) if seed is None else seed
    console = Console(stderr=True, highlight=False)
    where = machine()
    with private_home() as home:
        console.print(f"Seed {chosen}. Starting a system of its own: all engines and services.")
        run_claw(home, "up")
        if mutants:
            made = results.made(f"./claw prove --mutants --seed {chosen} --report", commit(), where)
            asyncio.run(_mutants(home, chosen, console, made, keep=report))
        else:
            found = asyncio.run(_prove(home, kills, chosen, names, instances, console))
            more = f" --faults {faults}" if faults else ""
            more += f" --instances {instances}" if instances > 1 else ""
            made = results.made(f"./claw prove --kills {kills} --seed {chosen}{more} --report", commit(), where, found)
    if report:
        console.print(f"Wrote {results.write(made)} and RESULTS.md.", soft_wrap=True)
    if as_json:
        print_json(made.report or made.mutants)
    elif made.report:
        show(made.report)
    else:
        show_mutants(made.mutants)
    if not (made.report.held if made.report else all_found(made.mutants)):
        raise typer.Exit(1)


async def _prove(home: Path, kills: int, seed: int, names: list[str], instances: int, console: Console) -> Report:
    system = System.at(home)
    async with model_server() as models, rigged(system, names, instances) as (rig, wires):
        campaign = Campaign(system, models, seed, names, instances=instances, rig=rig, wires=wires)
        return await campaign.run(kills, console.print)


async def _mutants(home: Path, seed: int, console: Console, made: results.Made, *, keep: bool) -> None:
    """Tries the control and each mutant, and adds their results. With `keep` each is written when it ends, and those of
    an earlier command with the same seed and code are not tried again. One that cannot end stops no other."""
    system = System.at(home)
    earlier = results.mutants_of(made) if keep else []
    async with model_server() as models, rigged(system, ["stop"]) as (rig, _):
        for mutant in (CONTROL, *MUTANTS):
            if known := next((result for result in earlier if result.guard == mutant.guard), None):
                made.mutants.append(known)
                continue
            try:
                made.mutants.append(await try_one(system, models, rig, seed, mutant, console.print))
            except Exception as error:
                console.print(f"without {mutant.guard}: the campaign did not end: {describe(error)}")
            if keep:
                results.write(made)


def all_found(found: list[Result]) -> bool:
    """True if the control held, and an invariant failed without each of the guards."""
    tried = {result.guard for result in found}
    return tried == {mutant.guard for mutant in (CONTROL, *MUTANTS)} and all(
        bool(result.found_by) == (result.guard != "none") for result in found
    )


def show(found: Report) -> None:
    """Prints the result for a person."""
    there = found.availability
    failed = ", ".join(f"{reason} {times}" for reason, times in found.failed_attempts.items()) or "none"
    missed = len(found.injected) - len(found.done)
    more = f", {missed} could not be injected" if missed else ""
    out.print(f"{len(found.done)} faults in {found.seconds:.0f} s{more}, seed {found.seed}: {', '.join(found.faults)}")
    out.print(f"{found.accepted} messages acknowledged in {found.attempts} calls; failed calls: {failed}")
    out.print(
        f"{found.replies} replies, {found.unknown} unknown, {found.extra_model_calls} extra calls of the model, "
        f"{found.poison} poisoned, {found.dead_letters} dead letters"
    )
    out.print(
        f"{there.in_time} of {there.calls} webhooks answered within 3 s; slowest {there.slowest_seconds} s, "
        f"slowest reply {there.slowest_reply_seconds} s"
    )
    for what, times in found.unplanned.items():
        _line(f"{times} dead letters beyond the poison: {what}")
    for verdict in found.invariants:
        mark = "[green]✓[/]" if verdict.held else "[red]✗[/]"
        out.print(f"{mark} {verdict.name} {verdict.promise}: {verdict.checked} {verdict.unit}", soft_wrap=True)
        for violation in verdict.violations[:10]:
            _line(f"    {violation.what} {violation.text}")
    for shown in found.shown:
        out.print(f"[red]{shown.invariant}[/], seed {found.seed}: the shortest history that shows it")
        for line in (shown.what, *shown.history):
            _line(f"    {line}")


def show_mutants(found: list[Result]) -> None:
    """Prints which invariants have found each mutant."""
    for result in found:
        good = bool(result.found_by) == (result.guard != "none")
        by = f"found by {', '.join(result.found_by)}: {result.first}" if result.found_by else "no invariant failed"
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        out.print(f"{mark} without {result.guard}: ", end="")
        _line(by)


def _line(text: str) -> None:
    out.print(Text(text), soft_wrap=True)
