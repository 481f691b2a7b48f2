"""RESULTS.md: first failures and gaps, then each campaign; the reports are JSON in ``results/``."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from infra.clock import utcnow
from tooling.stack.checkout import CHECKOUT
from tooling.testing.campaign.campaign import Report
from tooling.testing.campaign.faults import ENGINES, FAULTS, SERVICES
from tooling.testing.campaign.invariants import INVARIANTS
from tooling.testing.campaign.mutants import MUTANTS, Result
from tooling.testing.campaign.rig import TWIN

FILE, FOLDER = CHECKOUT / "RESULTS.md", CHECKOUT / "results"
_Z = 1.959964
# The figures do not show these.
GAPS = (
    'The mutant "epoch fence" survived a first run with stops at random. It was tried again, alone, with the '
    "model keeping its answers while the stopped process wakes: I4 found it. The control of that run, without "
    "a mutant, failed in I8: it judged the chain of the system, which is empty if the operator does nothing. "
    "Later campaigns do not.",
    "`all-60` failed in I5: after Kafka had lost its data, the reader of the search index went on at its old offset in "
    "the new log, and three records did not come into the index. This is corrected, and a test shows it.",
    "The mutants were tried one after the other by the functions of the command, on one system; the command "
    "itself has not run to its end yet. The commit of `mutants.json` is of a branch that was rebased since. In"
    " `all-4.json`, commit and time were entered by hand, and the code had changes that were committed later.",
    "Each engine is a single node: no replica is lost, and no network lies between the nodes of an engine.",
    "The first campaign of `clock` found that the timeline of a run hid the messages of a channel whose clock is "
    "ahead; `clock-wipe-21` has the same seed and the corrected code.",
    "Only the channel service has a wrong clock. A campaign with the agent service's five minutes slow found that a "
    "client with a right key was answered 401; it is answered 503 now, which a test shows and no campaign yet.",
    "Power is cut, and a disk is full, in `tests/faults/test_disk.py` on the kernel alone. Data is damaged in "
    "tests of PostgreSQL, Kafka and the object store, not in a campaign; damage in Milvus, OpenSearch and "
    "Valkey was not tried.",
    "A seed repeats the plan of faults and the messages of the clients, not the order in which the processes run.",
    "In `engines-wipe-38` the code had no change but this page.",
    "No campaign runs on several machines. With two instances of each service both share a port, so a request that is "
    "in an instance when it is killed fails, and the next connection reaches the other one.",
    "CI injects four faults into the running system and runs the tests of kills of each service; a larger campaign "
    "runs on demand.",
)

FAULTS_WANTED = 1000
"""In one campaign."""


class Made(msgspec.Struct, kw_only=True):
    """A file in ``results/``: a campaign, or the mutants."""

    at: str
    commit: str
    machine: str
    command: str
    report: Report | None = None
    mutants: list[Result] = []


def made(command: str, commit: str, machine: str, report: Report | None = None, mutants: Sequence[Result] = ()) -> Made:
    """`machine`: taken before the campaign put load on it."""
    at = utcnow().strftime("%Y-%m-%d %H:%M UTC")
    return Made(at=at, commit=commit, machine=machine, command=command, report=report, mutants=list(mutants))


def write(new: Made, file: Path = FILE, folder: Path = FOLDER) -> Path:
    """Keeps the JSON, in place of an older one of the same faults and seed, and writes the page. Returns the JSON's
    path."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{_name(new)}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(new), indent=1) + b"\n")
    found = [(each, msgspec.json.decode(each.read_bytes(), type=Made)) for each in sorted(folder.glob("*.json"))]
    file.write_text(page(found))
    return path


def mutants_of(new: Made, folder: Path = FOLDER) -> list[Result]:
    """The results of an earlier command with the same seed and the same code, which has not ended."""
    path = folder / f"{_name(new)}.json"
    if not path.exists():
        return []
    known = msgspec.json.decode(path.read_bytes(), type=Made)
    return known.mutants if (known.command, known.commit) == (new.command, new.commit) else []


def _name(new: Made) -> str:
    if not new.report:
        return "mutants"
    faults = "all" if len(new.report.faults) == len(FAULTS) else "-".join(new.report.faults)
    twice = "-twice" if new.report.instances > 1 else ""
    return f"{faults}-{new.report.seed}{twice}"


def page(found: Sequence[tuple[Path, Made]]) -> str:
    campaigns = [(path, one, one.report) for path, one in found if one.report]
    mutants = [(path, one) for path, one in found if one.mutants]
    lines = [
        "# Results of the campaigns",
        "",
        "`./claw prove --report` writes this page from the reports in `results/`. [docs/prove.md](docs/prove.md) has",
        "the load, the faults and the invariants. Figures of speed are in [BENCHMARKS.md](BENCHMARKS.md).",
        "",
        "## Failures and gaps",
        "",
        *_failures(campaigns, mutants),
        "",
        "## Invariants, all campaigns together",
        "",
        "The interval is Wilson's for the share of violations, at 95 %. It treats each checked thing as a trial of its",
        "own, which things that meet the same fault are not.",
        "",
        "| invariant | promise | checked | violations | 95 % |",
        "|---|---|---|---|---|",
    ]
    for name, (promise, unit, _) in INVARIANTS.items():
        verdicts = [v for _, _, report in campaigns for v in report.invariants if v.name == name]
        checked = sum(verdict.checked for verdict in verdicts)
        violations = sum(len(verdict.violations) for verdict in verdicts)
        interval = _share(violations, checked)
        lines.append(f"| {name} | {promise} | {checked:,} {unit} | {violations} | {interval} |")
    lines += ["", "## Mutants", "", *_mutants(mutants)]
    lines += ["", "## Campaigns"]
    for path, one, report in campaigns:
        lines += ["", *_campaign(path, one, report)]
    return "\n".join(lines) + "\n"


def _failures(campaigns: Sequence[tuple[Path, Made, Report]], mutants: Sequence[tuple[Path, Made]]) -> list[str]:
    lines = []
    for path, one, report in campaigns:
        for verdict in report.invariants:
            if verdict.violations:
                first = next(shown for shown in report.shown if shown.invariant == verdict.name)
                lines.append(
                    f"- **{verdict.name} failed** {_times(len(verdict.violations))}, seed {report.seed}, commit "
                    f"{one.commit}: {_sentence(first.what)}. `{one.command}`, history in "
                    f"[{path.name}](results/{path.name})"
                )
            elif not verdict.checked:
                lines.append(f"- {verdict.name} checked nothing, seed {report.seed}, commit {one.commit}")
        if report.unplanned:
            lines.append(
                f"- **{sum(report.unplanned.values())} dead letters beyond the poison**, seed {report.seed}, commit "
                f"{one.commit}: {_letters(report)}. History in [{path.name}](results/{path.name})"
            )
    tried = {result.guard for _, one in mutants for result in one.mutants}
    for _, one in mutants:
        lines += [
            f"- **Mutant survived**: without {result.guard} ({result.removed}) no invariant failed, seed {result.seed}"
            for result in one.mutants
            if result.guard != "none" and not result.found_by
        ]
    if missing := [mutant.guard for mutant in MUTANTS if mutant.guard not in tried]:
        lines.append(f"- Mutants that were not tried: {', '.join(missing)}")
    injected = [len(report.done) for _, _, report in campaigns]
    largest = max(injected, default=0)
    if largest < FAULTS_WANTED:
        lines.append(
            f"- The largest campaign had {largest} faults, all together {sum(injected)}. "
            f"The goal is {FAULTS_WANTED:,} in one campaign."
        )
    for path, one, report in campaigns:
        if missed := [fault for fault in report.injected if fault.missed]:
            lines.append(
                f"- {len(missed)} of {len(report.injected)} faults could not be injected, seed {report.seed}, commit "
                f"{one.commit}: {_cell(f'{missed[0].fault} {missed[0].target}: {missed[0].note}')}. The others in "
                f"[{path.name}](results/{path.name})"
            )
    kills = [fault for _, _, report in campaigns for fault in report.done if fault.fault in ("kill", "engines")]
    killed = {fault.target.removesuffix(TWIN) for fault in kills}
    if spared := [name for name in (*SERVICES, *ENGINES) if name not in killed]:
        lines.append(f"- Parts that were not killed in a campaign on this page: {', '.join(spared)}")
    done = {fault for _, _, report in campaigns for fault in report.faults}
    if missing := [name for name in FAULTS if name not in done]:
        lines.append(f"- Faults that no campaign on this page has: {', '.join(missing)}")
    return [*lines, *(textwrap.fill(f"- {gap}", 118, subsequent_indent="  ") for gap in GAPS)]


def _mutants(mutants: Sequence[tuple[Path, Made]]) -> list[str]:
    lines = []
    for path, one in mutants:
        lines += [
            f"{one.at}, commit {one.commit}, {one.machine}; [{path.name}](results/{path.name})",
            "",
            f"`{one.command}`",
            "",
            "| without | removed | found by | first finding |",
            "|---|---|---|---|",
        ]
        for result in one.mutants:
            by = ", ".join(result.found_by) or ("nothing, as it must be" if result.guard == "none" else "**survived**")
            lines.append(f"| {result.guard} | {result.removed} | {by} | {_cell(result.first)} |")
    return lines or ["None were tried: `./claw prove --mutants --report`"]


def _campaign(path: Path, one: Made, report: Report) -> list[str]:
    there = report.availability
    lines = [
        f"### {path.stem}",
        "",
        f"{one.at}, commit {one.commit}, {one.machine}; [{path.name}](results/{path.name})",
        "",
        f"`{one.command}`",
        "",
        *(["Each service runs twice.", ""] if report.instances > 1 else []),
        f"{len(report.done)} faults in {report.seconds:.0f} s: {_counts([fault.fault for fault in report.done])}.",
        f"{report.accepted} messages were acknowledged in {report.attempts} calls; {report.forged} forged ones,",
        f"{report.poison} poisoned. {report.replies} replies are visible, {report.unknown} deliveries unknown.",
        *([f"Dead letters beyond the poison: {_letters(report)}."] if report.unplanned else []),
        "",
        "| invariant | checked | violations | 95 % |",
        "|---|---|---|---|",
    ]
    for verdict in report.invariants:
        times = len(verdict.violations)
        share = _share(times, verdict.checked)
        lines.append(f"| {verdict.name} | {verdict.checked:,} {verdict.unit} | {times} | {share} |")
    lines += [
        "",
        f"Availability while the faults happened: {there.in_time} of {there.calls} webhooks were answered 200 by their",
        f"first call within 3 s, {_share(there.in_time, there.calls)}; median {there.median_seconds:.3f} s, slowest "
        f"{there.slowest_seconds:.1f} s, slowest reply {there.slowest_reply_seconds:.1f} s.",
        "",
        "| fault | times | until the next message was answered, median | slowest |",
        "|---|---|---|---|",
    ]
    by_fault: dict[str, list[float]] = defaultdict(list)
    for fault in report.injected:
        if fault.recovered_after is not None:
            by_fault[fault.fault].append(fault.recovered_after)
    lines += [
        f"| {name} | {len(times)} | {statistics.median(times):.1f} s | {max(times):.1f} s |"
        for name, times in sorted(by_fault.items())
    ]
    return lines


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _sentence(text: str) -> str:
    """The text without the JSON at its end, which the report has."""
    return text.partition('"')[0].rstrip(" .")


def _letters(report: Report) -> str:
    return _cell("; ".join(f"{times} of {what}" for what, times in report.unplanned.items()))


def _counts(names: Sequence[str]) -> str:
    return ", ".join(f"{name} {names.count(name)}" for name in dict.fromkeys(sorted(names))) or "none"


def _share(times: int, of: int) -> str:
    if not of:
        return "nothing checked"
    low, high = wilson(min(times, of), of)
    return f"{100 * low:.2f}–{100 * high:.2f} %"


def wilson(times: int, of: int) -> tuple[float, float]:
    """Wilson's score interval at 95 % for a share (Wilson 1927, JASA 22:209)."""
    share = times / of
    middle = share + _Z**2 / (2 * of)
    half = _Z * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    whole = 1 + _Z**2 / of
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def _cell(text: str) -> str:
    return textwrap.shorten(text.replace("|", "\\|"), 160, placeholder=" …")
