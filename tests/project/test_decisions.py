"""The decision records: each has a number of its own, the sections of the template, and fewer than 40 lines."""

from __future__ import annotations

from collections import Counter

from tooling.stack.checkout import CHECKOUT

FILES = sorted((CHECKOUT / "infra" / "decisions").glob("0*.md"))


def test_numbers_are_unique() -> None:
    numbers = Counter(path.name[:4] for path in FILES)
    assert [number for number, count in numbers.items() if count > 1] == []


def test_each_record_follows_the_template() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith(f"# {int(path.name[:4])}. "), path.name
        headings = [line for line in lines if line.startswith("## ")]
        assert headings == ["## Context", "## Decision", "## Consequence", "## Evidence"], path.name
        assert len(lines) < 40, path.name
