"""Tests of the table of the benches' results."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from tooling.bench.protocol import Figure, latency, units, verdict
from tooling.cli.bench import render


def test_each_kind_of_result_is_shown_at_80_columns() -> None:
    made_of = {"sockets": 10_000, "MiB before": 101.234}
    results: list[Figure] = [
        verdict("relay", "by hand", 0.8, [200.0] * 3, [100.0] * 3),
        latency("relay", "visible", 100, 50, [0.007] * 3),
        units("fanout", "of a socket", 25, 20.44, "KiB", **made_of),
    ]
    shown_on = StringIO()
    Console(file=shown_on, width=80).print(render(results))
    lines = shown_on.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 80
    text = " ".join(" ".join(lines).split())
    for shown in ("0.50×", "7 ms", "20.4 KiB", "≤ 25 KiB", "10,000", "101.23", "missed", "met"):
        assert shown in text
