"""`./claw test` repeats a few failed tests alone, and says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tooling.cli.test import MOST_REPEATED, run_suite

UNSTEADY = """
from pathlib import Path

def test_passes_the_second_time():
    mark = Path(__file__).with_suffix(".mark")
    if not mark.exists():
        mark.touch()
        raise AssertionError("the first time")

def test_passes():
    with Path(__file__).with_suffix(".count").open("a") as count:
        count.write("x")
"""


def test_a_test_that_passes_alone_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_unsteady.py").write_text(UNSTEADY)
    assert run_suite(tmp_path) == 0
    assert capfd.readouterr().out.splitlines()[-2:] == [
        "Unsteady tests: each failed beside others and passed alone. See the first failure above.",
        "  test_unsteady.py::test_passes_the_second_time",
    ]
    # The others ran once.
    assert (tmp_path / "test_unsteady.count").read_text() == "x"


def test_a_test_that_fails_twice_fails_the_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_wrong.py").write_text("def test_wrong():\n    raise AssertionError")
    (tmp_path / "test_unsteady.py").write_text(UNSTEADY)
    assert run_suite(tmp_path) == 1
    out = capfd.readouterr().out
    assert "They run again now" in out
    assert "Unsteady tests" not in out


def test_many_failures_are_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for n in range(MOST_REPEATED + 1):
        (tmp_path / f"test_unsteady_{n}.py").write_text(UNSTEADY)
    assert run_suite(tmp_path) == 1
    assert "They run again now" not in capfd.readouterr().out


def test_a_suite_that_cannot_be_collected_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    assert run_suite(tmp_path) != 0
    assert "Unsteady tests" not in capfd.readouterr().out
