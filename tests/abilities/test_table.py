"""The page is current, and each of its tests exists."""

from __future__ import annotations

import ast

import pytest

from services.channel import vendors
from tests.abilities.table import ABILITIES, PAGE, ROOT, VENDOR_TESTS, VENDORS, Proof, page


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.abilities.table"


def test_every_type_is_in_the_table() -> None:
    assert set(VENDORS) == set(vendors.VENDORS)


@pytest.mark.parametrize("ability", ABILITIES)
def test_each_cell_names_a_test_that_exists_or_a_reason(ability: str) -> None:
    cells = ABILITIES[ability]
    assert set(cells) == set(VENDORS)
    for vendor, cell in cells.items():
        if isinstance(cell, Proof):
            tree = ast.parse((ROOT / VENDOR_TESTS / cell.file).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
            assert cell.test in names, f"{vendor}: {cell.file} has no {cell.test}"
        else:
            assert cell.reason, vendor
