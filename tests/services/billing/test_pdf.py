"""Invoices as PDF: read back by an independent reader, the same bytes for the same data."""

from __future__ import annotations

from pypdfium2 import PdfDocument, raw  # type: ignore[import-untyped]

from services.billing.pdf import Page, document
from tests.services.billing.conftest import pdf_pages

PAGE = Page("Invoice INV-000001", ["To: 深圳市示例有限公司"], [], [("Subtotal", "1.000000000")], "Total 1.00 CNY")


def lines(*descriptions: str) -> Page:
    rows = [(str(n), text, "1,000", "12.500000000") for n, text in enumerate(descriptions, 1)]
    return Page(PAGE.title, PAGE.head, rows, PAGE.totals, PAGE.total)


async def test_every_line_is_on_a_page_in_its_order_with_any_character() -> None:
    texts = [f"line {n}: 中文發票 zażółć Größe счёт" for n in range(150)]
    pages = pdf_pages(await document(lines(*texts)))
    assert len(pages) > 2
    shown = "\n".join(pages)
    places = [shown.index(text) for text in texts]
    assert places == sorted(places)
    assert shown.startswith("Invoice INV-000001")
    assert "深圳市示例有限公司" in shown
    assert "Total 1.00 CNY" in pages[-1]


async def test_the_same_data_gives_the_same_bytes() -> None:
    assert await document(lines("中文")) == await document(lines("中文"))


async def test_the_fonts_are_in_the_file() -> None:
    opened = PdfDocument(await document(lines("中文")))
    texts = [found for found in opened[0].get_objects() if found.type == raw.FPDF_PAGEOBJ_TEXT]
    assert texts
    assert all(raw.FPDFFont_GetIsEmbedded(raw.FPDFTextObj_GetFont(found.raw)) == 1 for found in texts)
    opened.close()


async def test_a_text_is_never_run_as_markup() -> None:
    markup = '#panic("x") $x^2$ *bold* #read("/etc/hostname") <label> @reference'
    assert markup in pdf_pages(await document(lines(markup)))[0].replace("\n", " ")
