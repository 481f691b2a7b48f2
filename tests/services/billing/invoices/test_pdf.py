"""Invoices as PDF: read back by an independent reader, the same bytes for the same data."""

from __future__ import annotations

import unicodedata
from io import BytesIO
from typing import Any

import pytest
from msgspec import structs
from pypdf import PdfReader
from pypdfium2 import PdfDocument, raw  # type: ignore[import-untyped]

from infra.errors import TooLarge, TooManyRequests
from services.billing.invoices import pdf
from services.billing.invoices.invoice_files import page
from services.billing.invoices.pdf import Page, document
from tests.services.billing.conftest import pdf_pages
from tests.services.billing.invoices.test_einvoice import UNIT, invoice, line

PAGE = Page(
    "Invoice INV-000001",
    ["To: 深圳市示例有限公司"],
    [],
    [("Subtotal", "1.000000000")],
    "Total 1.00 CNY",
    "2026-11-03",
    "",
)


def lines(*descriptions: str) -> Page:
    rows = [(str(n), text, "1,000", "0.0125", "12.500000000") for n, text in enumerate(descriptions, 1)]
    return structs.replace(PAGE, lines=rows)


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


@pytest.mark.parametrize(
    ("applied", "totals", "total", "due"),
    [
        (0, [], "Total 119.00 EUR", "119.00"),
        (1900, [("Total", "119.00"), ("Paid by credit", "-19.00")], "Amount due 100.00 EUR", "100.00"),
        (11900, [("Total", "119.00"), ("Paid by credit", "-119.00")], "Amount due 0.00 EUR", "0.00"),
    ],
)
def test_the_page_asks_for_what_credit_has_not_paid_as_its_e_invoice_does(
    applied: int, totals: list[tuple[str, str]], total: str, due: str
) -> None:
    shown = page(invoice([line(100 * UNIT)], applied_minor=applied), [line(100 * UNIT)])
    assert (shown.totals[2:], shown.total) == (totals, total)
    assert ("Due: 2026-11-17" in shown.head) is (applied < 11900)
    assert f"<ram:DuePayableAmount>{due}<" in shown.xml


async def test_a_document_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "PRINT_SECONDS", 0)
    with pytest.raises(TooLarge, match="cannot be printed within 0 s"):
        await document(lines("x"))


def test_an_asker_has_one_document_at_a_time_and_others_are_not_refused() -> None:
    with pdf.one_each.place("a"), pdf.one_each.place("b"), pytest.raises(TooManyRequests), pdf.one_each.place("a"):
        pass
    with pdf.one_each.place("a"):
        pass


async def test_the_fonts_are_in_the_file() -> None:
    opened = PdfDocument(await document(lines("中文")))
    texts = [found for found in opened[0].get_objects() if found.type == raw.FPDF_PAGEOBJ_TEXT]
    assert texts
    assert all(raw.FPDFFont_GetIsEmbedded(raw.FPDFTextObj_GetFont(found.raw)) == 1 for found in texts)
    opened.close()


async def test_a_text_is_never_run_as_markup() -> None:
    markup = '#panic("x") $x^2$ *bold* #read("/etc/hostname") <label> @reference'
    assert markup in " ".join(pdf_pages(await document(lines(markup)))[0].split())


@pytest.mark.parametrize(
    "text",
    ["한국어 주식회사", "บริษัท ตัวอย่าง จำกัด", "شركة المثال المحدودة", "उदाहरण कंपनी लिमिटेड", "חברה לדוגמה", "臺灣範例"],
    ids=["Hangul", "Thai", "Arabic", "Devanagari", "Hebrew", "Traditional Chinese"],
)
async def test_the_fonts_have_the_characters_of(text: str) -> None:
    # The reader may order and join the letters of these scripts in another way, but finds each of them.
    shown = unicodedata.normalize("NFKC", pdf_pages(await document(lines(text)))[0])
    assert set(unicodedata.normalize("NFKC", text)) <= set(shown)
    assert "U+" not in shown


async def test_a_character_without_a_glyph_is_shown_as_its_number() -> None:
    shown = pdf_pages(await document(lines('crab 🦀, "\u0b95\\"')))[0]
    assert 'crab [U+1F980], "[U+0B95]\\"' in shown.replace("\n", " ")


async def test_an_attached_e_invoice_is_read_back_and_marked_as_factur_x() -> None:
    xml = "<invoice>中文 &amp; more</invoice>"
    page = structs.replace(lines("中文"), xml=xml)
    content = await document(page)
    assert await document(page) == content
    assert "中文" in pdf_pages(content)[0]
    reader = PdfReader(BytesIO(content))
    assert reader.attachments == {"factur-x.xml": [xml.encode()]}
    root: Any = reader.root_object
    assert root["/AF"][0]["/AFRelationship"] == "/Alternative"
    metadata = root["/Metadata"].get_data().decode()
    for part in ("<pdfaid:part>3<", "<fx:ConformanceLevel>EN 16931<", "<pdfaSchema:prefix>fx<"):
        assert metadata.count(part) == 1
    # The document's date is the invoice's, not that of the print.
    assert metadata.count("2026-11-03T00:00:00") >= 2
