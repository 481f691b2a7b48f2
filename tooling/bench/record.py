"""BENCHMARKS.md: one section per bench with its figures, the machine, the date and the command."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from infra.clock import utcnow
from tooling.bench.protocol import Figure, Latency, Result
from tooling.stack.checkout import CHECKOUT

FILE = CHECKOUT / "BENCHMARKS.md"


def record(found: Mapping[str, Sequence[Figure]], command: str, where: str, path: Path = FILE) -> None:
    """Replaces the sections of these benches in the file; the sections of other benches stay as they are.

    `found`: figures by the name of their bench. `command`: the command line that measured them. `where`: `machine()`,
    taken before the benches put load on it.
    """
    heading = f"{utcnow().date().isoformat()}, commit {commit()}, {where}\n\n`{command}`"
    sections = {name: _section(name, heading, figures) for name, figures in found.items()}
    text = re.sub(
        r"^Benches without figures here: (.*)\.$",
        lambda line: line[0].replace(
            line[1], ", ".join(n for n in line[1].split(", ") if n[1:-1] not in found) or "none"
        ),
        merged(path.read_text(), sections),
        flags=re.MULTILINE,
    )
    path.write_text(text)


def merged(text: str, sections: Mapping[str, str]) -> str:
    """`text` with these sections (by name, from the heading to the next one) in place of its own; new ones at the end,
    in alphabetical order of all."""
    start, *old = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    known = {section.split("\n", 1)[0].removeprefix("## ").strip(): section.rstrip() + "\n" for section in old}
    known.update({name: section.rstrip() + "\n" for name, section in sections.items()})
    return "\n".join([start.rstrip() + "\n", *(known[name] for name in sorted(known))])


def machine() -> str:
    """The machine and its load of the last minute. On a busy machine only the ratios are worth reading."""
    model = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), "")
    cpus = f"{os.cpu_count()} CPUs" + (f" ({model})" if model else "")
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{cpus}, {memory}, {system}, load {os.getloadavg()[0]:.1f}"


def _section(name: str, heading: str, figures: Sequence[Figure]) -> str:
    rows = [
        f"## {name}",
        "",
        heading,
        "",
        "| measure | figure | 95 % | goal | verdict | behind it |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*rows, *("| " + " | ".join(cells(figure)) + " |" for figure in figures)]) + "\n"


def cells(figure: Figure) -> tuple[str, ...]:
    """Measure, figure, interval, goal, verdict and the figures behind it, each as text."""
    verdict = "met" if figure.met else "missed"
    if isinstance(figure, Result):
        return (
            f"ratio to {figure.anchor}",
            f"{figure.ratio:.2f}",
            f"{figure.low:.2f}–{figure.high:.2f}",
            f"≥ {figure.goal:g}",
            "void" if figure.void else verdict,
            f"{figure.our_rate:,.0f} to {figure.anchor_rate:,.0f} per second, {figure.pairs} pairs",
        )
    if isinstance(figure, Latency):
        return (
            f"{figure.measure}, p99",
            f"{figure.p99_ms:.0f} ms",
            "",
            f"≤ {figure.goal_ms:g} ms",
            verdict,
            f"p50 {figure.p50_ms:.0f} ms, at {figure.rate:,.0f} per second, {figure.count} samples",
        )
    interval = "" if figure.low is None else f"{figure.low:.2f}–{figure.high:.2f}"
    behind = ", ".join(f"{name} {round(amount, 2):,}" for name, amount in figure.made_of.items())
    goal = "" if figure.goal is None else f"≤ {figure.goal:g} {figure.unit}"
    return figure.measure, f"{figure.value:.2f} {figure.unit}", interval, goal, verdict if goal else "", behind


def commit() -> str:
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
