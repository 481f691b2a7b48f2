"""BENCHMARKS.md keeps one section per bench, and a run replaces only its own."""

from __future__ import annotations

import re
from pathlib import Path

from tooling.bench.protocol import latency, median_units, units, verdict
from tooling.bench.record import FILE, cells, machine, merged, record
from tooling.bench.run import BENCHES


def test_a_run_replaces_its_own_section_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "BENCHMARKS.md"
    start = "# Benchmarks\n\nBenches without figures here: `idle`, `relay`, `soak`.\n"
    path.write_text(f"{start}\n## relay\n\nold relay\n\n## runs\n\nold runs\n")
    where = machine()
    figures = [verdict("relay", "by hand", 0.8, [200.0] * 3, [100.0] * 3)]
    record({"relay": figures}, "./claw bench relay --write", where, path)
    text = path.read_text()
    assert text.startswith("# Benchmarks\n\nBenches without figures here: `idle`, `soak`.\n\n## relay\n\n")
    assert "old relay" not in text
    assert "`./claw bench relay --write`" in text
    assert where in text
    assert "| ratio to by hand | 0.50 | 0.50–0.50 | ≥ 0.8 | missed | 100 to 200 per second, 3 pairs |" in text
    assert text.endswith("## runs\n\nold runs\n")
    again = text
    record({"relay": figures}, "./claw bench relay --write", where, path)
    assert path.read_text() == again


def test_a_bench_without_a_section_gets_one_in_alphabetical_order() -> None:
    text = merged("# B\n\n## bill\n\nx\n\n## runs\n\ny\n", {"idle": "## idle\n\nz\n"})
    assert text == "# B\n\n## bill\n\nx\n\n## idle\n\nz\n\n## runs\n\ny\n"


def test_each_kind_of_figure_has_its_row() -> None:
    assert cells(latency("relay", "visible", 100, 50, [0.007] * 3))[:5] == (
        "visible, p99",
        "7 ms",
        "",
        "≤ 100 ms",
        "met",
    )
    assert cells(units("fanout", "memory of a socket", 12, 20.44, "KiB", sockets=10_000)) == (
        "memory of a socket",
        "20.44 KiB",
        "",
        "≤ 12 KiB",
        "missed",
        "sockets 10,000",
    )
    assert cells(median_units("message", "CPU of a message", 30, [20.0, 20, 40], "ms"))[1:3] == (
        "20.00 ms",
        "20.00–40.00",
    )
    void = verdict("relay", "by hand", 0.8, [100.0, 100, 400], [100.0] * 3)
    assert cells(void)[4] == "void"


def test_the_file_has_sections_of_benches_only_and_names_those_without_figures() -> None:
    lines = FILE.read_text().splitlines()
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == sorted(headings)
    assert set(headings) <= set(BENCHES)
    [missing] = [line for line in lines if line.startswith("Benches without figures here: ")]
    assert re.findall("`([a-z-]+)`", missing) == sorted(set(BENCHES) - set(headings))
