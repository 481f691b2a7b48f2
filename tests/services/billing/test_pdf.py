"""Invoices as PDF: read back by an independent reader, the same bytes for the same data."""

from __future__ import annotations

from services.billing.pdf import MAX_COLUMNS, PER_PAGE, Row, document
from tests.services.billing.conftest import pdf_pages


def test_every_row_is_on_a_page_in_its_order() -> None:
    rows = [Row("Invoice INV-000001", bold=True), *(Row(f"line {n} (a\\b) 12.50 €") for n in range(PER_PAGE * 2))]
    pages = pdf_pages(document(rows))
    assert len(pages) == 3
    assert "\n".join(pages).splitlines() == [row.text for row in rows]


def test_the_same_data_gives_the_same_bytes() -> None:
    assert document([Row("a")]) == document([Row("a")])


def test_a_character_without_a_glyph_is_named_and_a_long_row_is_wrapped() -> None:
    assert pdf_pages(document([Row("中文 ü\x00")])) == ["<U+4E2D><U+6587> ü<U+0000>"]
    [page] = pdf_pages(document([Row("x" * (MAX_COLUMNS + 5))]))
    assert page.replace("\n", "").replace(" ", "") == "x" * (MAX_COLUMNS + 5)
    assert len(page.splitlines()) == 2
