"""Every accepted type of file as the parser reads it, and hostile files within the limits of its own process."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.stores import filetypes as types
from services.memory.domain import DAMAGED
from services.memory.files import ocr, parsing, spreadsheets
from tests.services.memory import files
from tooling.stack.checkout import CHECKOUT


def parse(content: bytes, type_: str) -> list[dict[str, Any]]:
    """The lines of the parser, in this process: to start one takes as long as a hundred files."""
    recognizer = ocr.load() if type_ == types.PDF else None
    return list(parsing.answer(io.BytesIO(content), type_, recognizer))


def parse_apart(folder: Path, content: bytes, type_: str) -> list[dict[str, Any]]:
    """The lines of the parser in its own process, within its limits."""
    path = folder / "file"
    path.write_bytes(content)
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "services.memory.files.parsing", type_, str(os.getpid())],
            stdin=file,
            cwd=CHECKOUT,
            env={"PYTHONUTF8": "1"},
            capture_output=True,
            check=False,
            timeout=150,
        )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def read(content: bytes, type_: str) -> tuple[list[dict[str, Any]], str | None]:
    """The passages, or the reason why there are none."""
    lines = parse(content, type_)
    passages = [line for line in lines if "text" in line]
    error = next((line["error"] for line in lines if "error" in line), None)
    assert error or lines[-1]["chunks"] == len(passages)
    return passages, error


def test_markdown_keeps_its_headings() -> None:
    passages, _ = read(files.handbook("en"), types.MARKDOWN)
    [descaling] = [passage for passage in passages if "(order number 7710)" in passage["text"]]
    assert descaling["section"] == "Norrland Linnea 2 – Owner's Handbook > Cleaning and care > Descaling"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030"])
def test_plain_text_in_the_encodings_of_the_world(encoding: str) -> None:
    text = "机器按照设定的硬度计算用水量，到时会提示除垢。只能使用原厂的液体除垢剂。" * 3
    passages, _ = read(text.encode(encoding), types.TEXT)
    assert passages[0]["text"] == text


def test_a_pdf_page_by_page_in_english_and_chinese() -> None:
    content = files.pdf(["The warranty is 30 months.", "保修期为三十个月。"])
    passages, _ = read(content, types.PDF)
    assert [(passage["text"], passage["page"]) for passage in passages] == [
        ("The warranty is 30 months.", 1),
        ("保修期为三十个月。", 2),
    ]


def test_a_sentence_that_a_page_breaks_off_is_whole_on_the_next() -> None:
    content = files.pdf(["Keep the receipt. The warranty is", "30 months."])
    passages, _ = read(content, types.PDF)
    assert [passage["text"] for passage in passages] == [
        "Keep the receipt. The warranty is",
        "The warranty is\n30 months.",
    ]


def test_html_without_its_scripts() -> None:
    page = "<html><body><h1>Returns</h1><script>let x = 1</script><p>Within 45 days &amp; unused.</p></body></html>"
    passages, _ = read(page.encode(), types.HTML)
    assert [(passage["text"], passage["section"]) for passage in passages] == [("Within 45 days & unused.", "Returns")]


def test_a_word_document() -> None:
    passages, _ = read(files.docx("Returns", "Within 45 days."), types.DOCX)
    assert "Within 45 days." in passages[-1]["text"]


def test_tracked_changes_are_read_as_accepted() -> None:
    text = (
        "Within </w:t></w:r><w:del><w:r><w:delText>30</w:delText></w:r></w:del>"
        "<w:ins><w:r><w:t>45</w:t></w:r></w:ins><w:r><w:t xml:space='preserve'> days."
    )
    passages, _ = read(files.docx("Returns", text), types.DOCX)
    assert [passage["text"] for passage in passages] == ["Within 45 days."]


def test_a_presentation_slide_by_slide() -> None:
    content = files.pptx([("Warranty", "30 months"), ("退货", "45 天之内")])
    passages, _ = read(content, types.PPTX)
    assert [(passage["text"], passage["section"], passage["page"]) for passage in passages] == [
        ("30 months", "Warranty", 1),
        ("45 天之内", "退货", 2),
    ]
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        *_, last = re.findall(rb"<p:sldId [^>]*>", archive.read("ppt/presentation.xml"))
    again = _changed(content, "ppt/presentation.xml", last, last * 3)
    assert read(again, types.PPTX) == (passages, None)


def test_the_last_line_of_a_slide_is_not_repeated_on_the_next_one() -> None:
    passages, _ = read(files.pptx([("", "Prices of May"), ("", "Prices of June")]), types.PPTX)
    assert [(passage["text"], passage["page"]) for passage in passages] == [("Prices of May", 1), ("Prices of June", 2)]


def test_every_passage_of_a_long_table_has_the_header() -> None:
    rows = [["Code", "Meaning"], *([f"E{n:03}", f"Something about valve number {n} is wrong"] for n in range(100))]
    passages, _ = read(files.xlsx("Errors", rows), types.XLSX)
    assert len(passages) > 5
    assert all(passage["text"].startswith("| Code | Meaning |") for passage in passages)
    assert {passage["section"] for passage in passages} == {"Errors"}


ITEMS = [[f"Valve {n}", f"{n}", f"{n * 2}"] for n in range(60)]
TITLED = {
    "sheet": (files.xlsx("a", [["Price list 2026"], [], ["Item", "Qty", "Price"], *ITEMS]), types.XLSX),
    "csv": (
        "\n".join(["Price list 2026", "", "Item,Qty,Price", *map(",".join, ITEMS)]).encode(),
        types.CSV,
    ),
    "page": (
        b"<table><tr><th colspan=3>Price list 2026</th></tr><tr><th>Item<th>Qty<th>Price</tr>"
        + "".join(f"<tr><td>{'<td>'.join(row)}</tr>" for row in ITEMS).encode(),
        types.HTML,
    ),
}


@pytest.mark.parametrize(("content", "type_"), TITLED.values(), ids=TITLED)
def test_a_title_above_a_table_is_not_its_header(content: bytes, type_: str) -> None:
    passages, _ = read(content, type_)
    first, *others = [passage["text"] for passage in passages]
    assert first.startswith("Price list 2026\n")
    assert len(others) >= 2
    assert all("| Item | Qty | Price |\n| --- | --- | --- |\n" in text for text in (first, *others))
    assert all(text.startswith("| Item |") for text in others)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            [["Prices", ""], ["", ""], ["Item", "Qty"], ["Valve", "3"]],
            "Prices\n\n\n| Item | Qty |\n|-|\n| Valve | 3 |\n",
        ),
        ([["Prices", "of May"], ["a", "b", "c", "d", "e"]], "Prices, of May\n\n| a | b | c | d | e |\n|-|\n"),
        (
            [["Customer", "Ann", "", ""], ["a", "b", "c", ""], ["1", "2", "3", "4"]],
            "Customer, Ann\n\n| a | b | c |  |\n|-|\n| 1 | 2 | 3 | 4 |\n",
        ),
        (
            [["Customer", "Ann", ""], ["Date", "2 May", ""], ["Item", "Qty", "Price"], ["Valve", "3", "9.50"]],
            "Customer, Ann\nDate, 2 May\n\n| Item | Qty | Price |\n|-|\n| Valve | 3 | 9.50 |\n",
        ),
        # Columns without a name.
        ([["k", "v", ""], ["a", "1", "x"], ["b", "2", "y"]], "| k | v |  |\n|-|\n| a | 1 | x |\n| b | 2 | y |\n"),
        ([["", "u", "v"], ["a", "b", "c"], ["d", "1", "2"]], "|  | u | v |\n|-|\n| a | b | c |\n| d | 1 | 2 |\n"),
        # One wide row does not make a header.
        ([["k", "v", "", ""], ["1", "2", "3", "4"]], "| k | v |  |  |\n|-|\n| 1 | 2 | 3 | 4 |\n"),
        ([["", "Sold"], ["North", "5"]], "|  | Sold |\n|-|\n| North | 5 |\n"),
        # A chart without names of its series.
        ([["", ""], ["North", "5"]], "|  |  |\n|-|\n| North | 5 |\n"),
        ([["Code"], ["E04"]], "| Code |\n|-|\n| E04 |\n"),
        ([], ""),
    ],
)
def test_the_header_is_the_first_row_that_fills_half_of_the_columns(rows: list[list[str]], text: str) -> None:
    assert re.sub(r"\|(?: --- \|)+", "|-|", spreadsheets.table(rows)) == text


HEADERS = {
    "parts below names": (["2025", None, "2026", None], ["Q1", "Q2", "Q1", "Q2"], "2025 Q1 2025 Q2 2026 Q1 2026 Q2"),
    "column beside": (["Item", "Sales", None, "Note"], [None, "2025", "2026", None], "Item Sales 2025 Sales 2026 Note"),
    "values": (["Item", "Sales", None, "Note"], [None, "12", "13.5", None], "Item Sales Note"),
    "another name": (["Item", "Sales", None, "Note"], ["Pump", "North", "South", "x"], "Item Sales Note"),
}


@pytest.mark.parametrize(("above", "below", "names"), HEADERS.values(), ids=HEADERS)
def test_two_rows_of_a_header_are_one(above: list[str | None], below: list[str | None], names: str) -> None:
    from openpyxl import Workbook  # type: ignore[import-untyped]
    from pptx import Presentation

    width = len(above)
    spans = [n for n, name in enumerate(above[1:]) if name is None]
    book, deck = Workbook(), Presentation()
    numbers = [str(n) for n in range(1, width + 1)]
    rows: list[list[str | None]] = [above, below, [*numbers]]
    book.active.append(["Sold pumps"])
    for row in rows:
        book.active.append(row)
    book.active.merge_cells(start_row=1, end_row=1, start_column=1, end_column=width)
    slide = deck.slides.add_slide(deck.slide_layouts[6])
    table = slide.shapes.add_table(3, width, 0, 0, 9, 9).table
    for n, row in enumerate(rows):
        for column, name in enumerate(row):
            table.cell(n, column).text = name or ""
    for column in spans:
        book.active.merge_cells(start_row=2, end_row=2, start_column=column + 1, end_column=column + 2)
        table.cell(0, column).merge(table.cell(0, column + 1))
    cells = "".join(f"<th colspan={1 + (n in spans)}>{name}" for n, name in enumerate(above) if name is not None)
    page = f"<table><tr>{cells}</tr><tr><th>{'<th>'.join(name or '' for name in below)}</tr>"
    page += f"<tr><td>{'<td>'.join(numbers)}</tr></table>"
    out, shown = io.BytesIO(), io.BytesIO()
    book.save(out)
    deck.save(shown)
    texts = [
        read(content, type_)[0][0]["text"]
        for content, type_ in (
            (out.getvalue(), types.XLSX),
            (shown.getvalue(), types.PPTX),
            (page.encode(), types.HTML),
        )
    ]
    for text in texts:
        [header] = [line for line, rule in zip(text.split("\n"), text.split("\n")[1:], strict=False) if "---" in rule]
        assert " ".join(header.replace("|", " ").split()) == names


def test_each_passage_of_a_wide_table_names_the_columns_of_its_values() -> None:
    names = [f"Measure {n} of the pump in winter" for n in range(24)]
    rows = [["Serial", *names], *([f"S{n}", *(f"{n}.{m}" for m in range(24))] for n in range(1_002))]
    rows[5][9:] = []
    for content, type_ in (
        (files.xlsx("Wide", rows), types.XLSX),
        ("\n".join(map(",".join, [[*row] for row in rows])).encode(), types.CSV),
    ):
        passages, _ = read(content, type_)
        values: dict[tuple[str, str], str] = {}
        for passage in passages:
            header, _, *lines = (re.split(r" *\| *", line)[1:-1] for line in passage["text"].splitlines())
            assert header[0] == "Serial"
            for line in lines:
                values |= {(line[0], name): value for name, value in zip(header[1:], line[1:], strict=False) if value}
        for n, row in enumerate(rows[1:]):
            for m, value in enumerate(row[1:]):
                assert values.pop((f"S{n}", names[m])) == value
        assert values == {}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_each_piece_of_a_csv_table_has_its_header(delimiter: str) -> None:
    rows = [f'E{n:03}{delimiter}"Valve {n}, the ""left"" one,\nis | wrong"{delimiter}{n * 0.5}' for n in range(1200)]
    content = delimiter.join(("Code", "Meaning", "Share")) + "\r\n\r\n" + "\r\n".join(rows)
    passages, _ = read(content.encode("gbk"), types.CSV)
    assert all(passage["text"].startswith("| Code | Meaning | Share |\n") for passage in passages)
    text = "\n".join(passage["text"] for passage in passages)
    for n in (0, 999, 1000, 1199):
        assert f'| E{n:03} | Valve {n}, the "left" one, is \\| wrong | {n * 0.5} |' in text


def test_an_e_book_chapter_by_chapter(tmp_path: Path) -> None:
    content = files.epub(
        {
            "two%20words.xhtml": '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml">'
            "<head><title/><script/></head><body><h1>保修</h1><p>三十个月。</p></body></html>",
            "b.xhtml": "<html><body><h1>Returns</h1><p>Within 45 days.</p></body></html>",
            "gone.xhtml": "",
        }
    )
    with zipfile.ZipFile(io.BytesIO(content)) as book, zipfile.ZipFile(tmp_path / "book", "w") as stored:
        for name in book.namelist():
            stored.writestr(name.replace("%20", " "), book.read(name))
    lines = parse((tmp_path / "book").read_bytes(), types.EPUB)
    assert [(line["text"], line["section"]) for line in lines if "text" in line] == [
        ("三十个月。", "保修"),
        ("Within 45 days.", "Returns"),
    ]
    assert lines[-1]["warnings"] == ["A part of the e-book is missing: OEBPS/gone.xhtml."]


TITLES = """
<html xmlns:epub="http://www.idpf.org/2007/ops">
<nav epub:type="page-list"><ol><li><a href="b.xhtml">12</a></li></ol></nav>
<nav epub:type="toc"><ol><li><a href="a.xhtml">Part I</a><ol><li><a href="b.xhtml">Care</a><ol><li>
<a href="b.xhtml#s2">Safety</a></li></ol></li></ol></li><li><span>Terms</span><ol><li>
<a href="d.xhtml#r">2. Returns</a></li><li><a href="d.xhtml#p">3. Post</a></li></ol></li></ol></nav></html>"""
OLDER_TITLES = """
<ncx><navMap><navPoint><navLabel><text>Part I</text></navLabel><content src="a.xhtml"/><navPoint><navLabel>
<text>Care</text></navLabel><content src="b.xhtml"/><navPoint><navLabel><text>Safety</text></navLabel>
<content src="b.xhtml#s2"/></navPoint></navPoint></navPoint><navPoint><navLabel><text>Terms</text></navLabel>
<navPoint><navLabel><text>2. Returns</text></navLabel><content src="d.xhtml#r"/></navPoint><navPoint><navLabel>
<text>3. Post</text></navLabel><content src="d.xhtml#p"/></navPoint></navPoint></navMap></ncx>"""


@pytest.mark.parametrize("contents", [TITLES, OLDER_TITLES])
def test_the_table_of_contents_of_an_e_book_gives_the_sections_without_headings(contents: str) -> None:
    """A chapter may be several files, or several chapters one file."""
    chapters = {
        "0.xhtml": "<p>Copyright.</p>",
        "a.xhtml": "<p>All parts.</p>",
        "b.xhtml": "<p>Care</p><p>Fill it.</p><p id='s2'>With care.</p>",
        "c.xhtml": "<p>And more.</p>",
        "d.xhtml": "<div id='r'><h1>Returns</h1><p>45 days.</p></div><p><a id='p'/>By mail.</p>",
    }
    book = files.epub({name: f"<html><body>{text}</body></html>" for name, text in chapters.items()})
    book = _changed(
        book, "OEBPS/toc.xhtml", b"<html><body><nav>the table of contents</nav></body></html>", contents.encode()
    )
    if contents == OLDER_TITLES:
        kind = b'media-type="application/xhtml+xml" properties="nav"'
        book = _changed(book, "OEBPS/book.opf", kind, b'media-type="application/x-dtbncx+xml"')
    assert [(line["text"], line["section"]) for line in parse(book, types.EPUB) if "text" in line] == [
        ("Copyright.", None),
        ("All parts.", "Part I"),
        ("Fill it.", "Part I > Care"),
        ("With care.", "Part I > Care > Safety"),
        ("And more.", "Part I > Care > Safety"),
        ("45 days.", "Terms > Returns"),
        ("By mail.", "Terms > 3. Post"),
    ]


MAIL = """From: =?gb2312?B?zfXQoczv?= <wang@example.com>
To: shop@example.com
Date: Mon, 30 Nov 2026 09:00:00 +0800
Subject: =?utf-8?Q?Order_7710=3A_na=C3=AFve_question?=
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="A"

--A
Content-Type: multipart/alternative; boundary="B"

--B
Content-Type: text/plain; charset=iso-2022-jp
Content-Transfer-Encoding: base64

{japanese}
--B
Content-Type: text/html

<p>the same as HTML</p>
--B--
--A
Content-Type: application/pdf
Content-Disposition: attachment; filename="=?utf-8?B?5Y+R56WoLnBkZg==?="

%PDF-1.7
--A
Content-Type: message/rfc822

Subject: the first answer
Content-Type: text/html; charset=gbk
Content-Transfer-Encoding: 8bit

<h2>Terms</h2><p>"""


def test_an_e_mail_with_its_people_its_text_and_the_e_mails_that_it_encloses() -> None:
    japanese = base64.b64encode("保証期間は三十か月です。".encode("iso-2022-jp")).decode()
    content = MAIL.format(japanese=japanese).encode() + "退货四十五天</p>\n--A--\n".encode("gbk")
    lines = parse(content, types.MAIL)
    subject = "Order 7710: naïve question"
    assert [(line["section"], line["text"]) for line in lines if "text" in line] == [
        (
            subject,
            "From: 王小田 <wang@example.com>\nTo: shop@example.com\nDate: Mon, 30 Nov 2026 09:00:00 +0800\n\n"
            "保証期間は三十か月です。",
        ),
        ("the first answer > Terms", "退货四十五天"),
    ]
    assert lines[-1]["warnings"] == ["Attachments are not read: 发票.pdf. Upload them as documents."]


ALTERNATIVES = {
    "attachment beside the page": (
        [
            ("text/plain", "See the plan."),
            (
                "multipart/mixed; boundary=C",
                "--C\nContent-Type: text/html\n\n<p>See the plan.\n--C\nContent-Type: application/pdf; name=plan.pdf\n"
                "\n%PDF\n--C\nContent-Type: message/rfc822\n\nSubject: a\n\nenclosed\n--C--",
            ),
        ],
        ["See the plan.", "enclosed"],
        ["Attachments are not read: plan.pdf. Upload them as documents."],
    ),
    "plain text that refers to the page": (
        [("text/plain", "Your program cannot show it."), ("text/html", "<p>The filter costs 12 euros. " * 5)],
        ["\n\n".join(["The filter costs 12 euros."] * 5)],
        [],
    ),
    "invitation": (
        [("text/html", "<p>We meet on Monday."), ("text/calendar", "BEGIN:VCALENDAR")],
        ["We meet on Monday."],
        [],
    ),
    "page with its pictures": (
        [
            ("text/rtf", "{\\rtf1 a}"),
            ("multipart/related; boundary=C", "--C\nContent-Type: text/html\n\n<p>in the page\n--C--"),
        ],
        ["in the page"],
        [],
    ),
    "damaged text": ([("text/plain; charset=utf-8", "Grüße aus Köln \udcff")], ["Grüße aus Köln \ufffd"], [DAMAGED]),
}


@pytest.mark.parametrize(("parts", "texts", "warnings"), ALTERNATIVES.values(), ids=ALTERNATIVES)
def test_of_the_alternatives_of_an_e_mail_the_one_with_the_text_is_read(
    parts: list[tuple[str, str]], texts: list[str], warnings: list[str]
) -> None:
    mail = "Subject: a\nContent-Type: multipart/alternative; boundary=B\n\n"
    mail += "".join(f"--B\nContent-Type: {type_}\n\n{content}\n" for type_, content in parts) + "--B--\n"
    lines = parse(mail.encode(errors="surrogateescape"), types.MAIL)
    assert [line["text"] for line in lines if "text" in line] == texts
    assert lines[-1]["warnings"] == warnings


def test_a_part_of_an_e_mail_in_rtf_is_named() -> None:
    mail = (
        b"Subject: a\nContent-Type: multipart/mixed; boundary=B\n\n--B\n\nsee below\n--B\nContent-Type: text/rtf\n\n"
        rb"{\rtf1 a}" + b"\n--B--\n"
    )
    lines = parse(mail, types.MAIL)
    assert [line["text"] for line in lines if "text" in line] == ["see below"]
    assert lines[-1]["warnings"] == ["Attachments are not read: text/rtf. Upload them as documents."]


# 30 November 2026, 01:00 UTC, in tenths of microseconds since 1601.
SENT = 134404740000000000


def test_an_e_mail_of_outlook_with_its_people_its_text_and_the_e_mails_that_it_encloses() -> None:
    enclosed = files.outlook(
        {
            "3FFD0003": 936,
            "0037001E": "首封".encode("gbk"),
            "10130102": '<meta charset="gbk"><h2>Terms</h2><p>退货'.encode("gbk"),
        },
        is_enclosed=True,
    )
    content = files.outlook(
        {
            "001A001F": "IPM.Note",
            "0037001F": "Order 7710",
            "0C1A001F": "王小田",
            "5D01001F": "wang@example.com",
            "0E04001F": "shop@example.com; 李",
            "1000001F": "保修期为三十个月。\r\nRegards\0",
            "10130102": b"<p>the same as HTML</p>",
            "00390040": SENT,
        },
        {"__substg1.0_3707001F": "发票.pdf".encode("utf-16-le"), "__substg1.0_37010102": b"%PDF-1.7"},
        {"__substg1.0_3704001F": "a.msg".encode("utf-16-le"), "__substg1.0_3701000D": enclosed},
    )
    lines = parse(files.compound(content), types.OUTLOOK)
    assert [(line["section"], line["text"]) for line in lines if "text" in line] == [
        (
            "Order 7710",
            "From: 王小田 <wang@example.com>\nTo: shop@example.com; 李\nDate: Mon, 30 Nov 2026 01:00:00 +0000\n\n"
            "保修期为三十个月。\nRegards",
        ),
        ("首封 > Terms", "退货"),
    ]
    assert lines[-1]["warnings"] == ["Attachments are not read: 发票.pdf. Upload them as documents."]


def test_the_text_of_an_e_mail_that_is_only_in_rtf_is_named() -> None:
    enclosed = files.outlook({"0037001F": "a", "10090102": b"LZFu"}, is_enclosed=True)
    content = files.outlook({"1000001F": "see below"}, {"__substg1.0_3701000D": enclosed})
    lines = parse(files.compound(content), types.OUTLOOK)
    assert [line["text"] for line in lines if "text" in line] == ["see below"]
    [warning] = lines[-1]["warnings"]
    assert "in RTF, which is not read" in warning


@pytest.mark.parametrize(
    ("content", "type_", "reason"),
    [
        (files.compound(files.outlook({"001A001F": "IPM.Note.SMIME"})), types.OUTLOOK, "encrypted"),
        (files.compound(files.outlook({"0037001F": "a"})), types.OUTLOOK, "has no text"),
        (files.compound({"WordDocument": b"x"}), types.OUTLOOK, "has no text"),
        (files.compound({"WordDocument": b"x"}), types.OLD_OFFICE, "of Office before 2007"),
        (rb"{\rtf1\ansi a}", types.RTF, "in RTF"),
        (files.compound({"EncryptedPackage": b"x"}), types.OLD_OFFICE, "encrypted"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", types.OLD_OFFICE, "file of Office; it may be damaged"),
        (files.added(files.docx("a", "b"), "word/vbaProject.bin"), types.DOCX, "macros"),
        (files.added(files.xlsx("a", [["b"]]), "xl/macrosheets/sheet1.xml"), types.XLSX, "macros"),
        (files.compound(files.outlook({"1000001F": "x" * 99}))[:1000], types.OUTLOOK, "of Outlook; it may be damaged"),
        (b'a,b\n"' + b"x" * 200_000, types.CSV, "table (CSV) cannot be read at line 2: field larger than field limit"),
        (files.epub({"a.xhtml": "<p>a"}, encrypted="a.xhtml"), types.EPUB, "encrypted"),
        (files.damaged(files.epub({"a.xhtml": "<p>a"}), "OEBPS/book.opf"), types.EPUB, "e-book; it may be damaged"),
        (b"Subject: a\nContent-Type: application/pkcs7-mime\n\nMIAG", types.MAIL, "encrypted"),
        (b"Subject: a\n\n", types.MAIL, "has no text"),
        (files.pdf(["secret"], encrypted=True), types.PDF, "encrypted"),
        (files.pdf(["cut"])[:300], types.PDF, "PDF; it may be damaged"),
        (files.pdf([""]), types.PDF, "has no text"),
        (files.damaged(files.docx("a", "b"), "word/document.xml"), types.DOCX, "Word document; it may be damaged"),
        (files.damaged(files.xlsx("a", [["b"]]), "xl/workbook.xml"), types.XLSX, "spreadsheet; it may be damaged"),
        (b" \n\n\t ", types.TEXT, "has no text"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_reason(content: bytes, type_: str, reason: str) -> None:
    passages, error = read(content, type_)
    assert passages == []
    assert error is not None
    assert reason in error


TEXTS = [
    ("gbk", "机器需要除垢"),
    ("gbk", "退货请在四十五天之内联系客服。"),
    ("gbk", "订单号 7710 已发货"),
    (
        "gbk",
        "Thank you for your order of 3 March. 我们将在两天内发货。 Best regards, Norrland. " + "More words. " * 300,
    ),
    ("big5", "機器需要每月除垢，退貨請聯繫客服"),
    ("shift_jis", "保証期間は三十か月です。"),
    ("euc_kr", "보증 기간은 30개월입니다."),
    ("cp1251", "Гарантия тридцать месяцев"),
    ("cp1252", "Grüße aus Köln – „na so was“"),
    ("cp1250", "Příliš žluťoučký kůň úpěl ďábelské ódy"),
    ("cp1251", "Зустріч починається о третій годині"),
    ("koi8_r", "Встреча начинается в три часа дня"),
    ("cp1253", "Η συνάντηση αρχίζει στις τρεις το απόγευμα."),
    ("cp1253", "ΠΡΟΣΟΧΗ: Η πόρτα κλείνει αυτόματα"),
    ("cp1254", "Toplantı öğleden sonra üçte başlıyor, İstanbul'da görüşürüz."),
    ("cp1255", "הפגישה מתחילה בשלוש אחר הצהריים בחדר שתיים."),
    ("cp1256", "يبدأ الاجتماع في الساعة الثالثة بعد الظهر."),
    ("iso8859_6", "يبدأ الاجتماع في الساعة الثالثة بعد الظهر."),
    ("cp874", "การประชุมเริ่มเวลาบ่ายสามโมงที่ห้องประชุมสอง"),
    ("iso2022_jp", "会議は午後三時に始まります。"),
]


@pytest.mark.parametrize(("encoding", "text"), TEXTS)
def test_short_texts_are_read_in_their_encoding(encoding: str, text: str) -> None:
    passages, _ = read(text.encode(encoding), types.TEXT)
    assert text.strip().startswith(passages[0]["text"][:200].strip())
    assert parse(text.encode(encoding), types.TEXT)[-1]["warnings"]


def test_a_text_in_no_known_encoding_is_refused() -> None:
    passages, error = read(bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D]) * 4, types.TEXT)
    assert passages == []
    assert error == "The character encoding of the text is not recognised. Save the file as UTF-8."


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        ("gbk", '<meta charset="gbk">'),
        ("gbk", ""),
        ("shift_jis", '<meta http-equiv="Content-Type" content="text/html; charset=Shift_JIS">'),
        ("gbk", '<meta charset="utf-8">'),
        ("utf-16", '<meta charset="utf-8">'),
    ],
)
def test_a_page_is_read_in_its_encoding_without_its_hidden_parts(encoding: str, head: str) -> None:
    words = "保証期間は三十か月です。" if encoding == "shift_jis" else "保修期为三十个月，退货请联系客服。"
    page = (
        f"<html><head>{head}<title>t</title><style>p{{}}</style></head><body><h1>{words}</h1><p>{words} &amp; more</p>"
        "<script>secret1</script><noscript>secret2</noscript><template><p>secret3</p></template>"
        '<div hidden>secret4</div><p style="color: red; display:none">secret5</p>'
        '<span aria-hidden="true">secret6</span>'
        "<!-- secret7 --><p>after</p></body></html>"
    )
    passages, _ = read(page.encode(encoding), types.HTML)
    text = "".join(passage["text"] for passage in passages)
    assert (text, passages[0]["section"]) == (f"{words} & more\n\nafter", words)


def test_a_page_is_read_in_the_encoding_of_its_declaration() -> None:
    page = '<?xml version="1.0" encoding="iso-8859-2"?><html><body><p>Żółty źrebak</p></body></html>'
    passages, _ = read(page.encode("iso8859_2"), types.HTML)
    assert passages[0]["text"] == "Żółty źrebak"


def test_a_page_with_a_damaged_byte_is_read_with_a_warning() -> None:
    page = '<meta charset="utf-8"><p>保修期为三十个月</p><p>'.encode() + b"\xe9</p>"
    lines = parse(page, types.HTML)
    assert [line["text"] for line in lines if "text" in line] == ["保修期为三十个月\n\n\ufffd"]
    assert lines[-1]["warnings"] == ["Some characters of the text are damaged, so they are not read."]


def test_cells_that_span_rows_and_columns_keep_the_others_in_their_columns() -> None:
    page = (
        "<table><tr><th colspan=2>Place</th><th>Sold</th></tr>"
        "<tr><td rowspan=2>North</td><td>Oslo</td><td>5</td></tr><tr><td>Bergen</td><td>7</td></tr>"
        "<tr><td>South</td><td>Rome</td><td rowspan=0>9</td></tr></table>"
    )
    passages, _ = read(page.encode(), types.HTML)
    assert passages[0]["text"].splitlines() == [
        "| Place |  | Sold |",
        "| --- | --- | --- |",
        "| North | Oslo | 5 |",
        "| North | Bergen | 7 |",
        "| South | Rome | 9 |",
    ]


def test_spans_of_cells_do_not_make_a_small_page_large() -> None:
    page = b"<table>" + b"<tr><td colspan=100 rowspan=100>x</td></tr>" * 2_000
    passages, _ = read(page, types.HTML)
    assert sum(len(passage["text"]) for passage in passages) < 10_000_000


def test_spans_do_not_make_a_small_page_large() -> None:
    row = f"<tr><td rowspan=100 colspan=99999>{'x' * 20_000}</td></tr>"
    passages, _ = read(f"<table>{row}{'<tr><td>y</td></tr>' * 100}</table>".encode(), types.HTML)
    assert sum(len(passage["text"]) for passage in passages) < 2_500_000


def test_tables_side_by_side_in_a_sheet_are_read_one_after_the_other() -> None:
    rows: list[list[object]] = [
        ["Part", "Price", None, "Shop", "Town"],
        ["Pump", 12, None, "North", "Oslo"],
        ["Valve", 7, None, None, None],
        ["Gasket", 3, None, "South", "Rome"],
    ]
    passages, _ = read(files.xlsx("Stock", rows), types.XLSX)
    assert [passage["text"].splitlines()[2:] for passage in passages] == [
        ["| Pump | 12 |", "| Valve | 7 |", "| Gasket | 3 |"],
        ["| North | Oslo |", "| South | Rome |"],
    ]


def test_tables_below_each_other_have_their_own_headers() -> None:
    rows: list[list[object]] = [
        ["Stock in May"],
        [],
        ["Part", "Price", "Unit"],
        ["Pump", 12, "piece"],
        [],
        # An empty row within the table.
        ["Valve", 7, "piece"],
        ["Gasket", "unknown", "box"],
        ["Seal", 2, "box"],
        [],
        ["Towns"],
        ["Shop", "Staff", "Opened"],
        ["North", 31, 1998],
        ["South", 14, 2004],
        [],
        ["Shop", "Staff", "Opened"],
        ["East", 5, 2011],
    ]
    lines = ["\t".join(map(str, row)) for row in rows]
    for content, type_ in ((files.xlsx("May", rows), types.XLSX), ("\n".join(lines).encode(), types.CSV)):
        passages, _ = read(content, type_)
        assert [passage["text"].replace("| --- ", "").replace("\n|\n", "\n") for passage in passages] == [
            "Stock in May\n\n| Part | Price | Unit |\n| Pump | 12 | piece |\n"
            "| Valve | 7 | piece |\n| Gasket | unknown | box |\n| Seal | 2 | box |",
            "Towns\n\n| Shop | Staff | Opened |\n| North | 31 | 1998 |\n| South | 14 | 2004 |",
            "| Shop | Staff | Opened |\n| East | 5 | 2011 |",
        ]


def test_an_empty_column_within_a_table_does_not_cut_it() -> None:
    """A single column, and columns of numbers that only the first column names."""
    rows: list[list[object]] = [["Part", None, "2025", "2026", None, "Note"], ["Pump", None, 12, 13, None, "new"]]
    passages, _ = read(files.xlsx("Stock", rows), types.XLSX)
    assert [passage["text"].splitlines()[2:] for passage in passages] == [["| Pump | 12 | 13 | new |"]]


def test_a_merged_cell_of_a_sheet_stands_in_each_of_its_rows() -> None:
    from openpyxl import Workbook

    book = Workbook()
    for row in (["region", "month"], ["North", "May"], [None, "June"], [None, None], ["South", "May"]):
        book.active.append(row)
    book.active.merge_cells("A2:A4")
    out = io.BytesIO()
    book.save(out)
    passages, _ = read(out.getvalue(), types.XLSX)
    assert passages[0]["text"].splitlines()[2:] == ["| North | May |", "| North | June |", "| South | May |"]


def test_a_word_document_is_read_with_its_headers_and_footers() -> None:
    paragraph = "<w:p><w:r><w:t>{}</w:t></w:r></w:p>".format
    out = io.BytesIO(files.docx("Care", "Descale it."))
    with zipfile.ZipFile(out, "a") as archive:
        for name, lines in {
            "header1": ["Policy  77", "2026-0417"],
            "header2": ["Policy 77"],
            "footer1": ["Valid to 2027", "3", "- 4 / 10 -"],
        }.items():
            words = "".join(map(paragraph, lines))
            archive.writestr(f"word/{name}.xml", f'<w:hdr xmlns:w="{files.WORD}">{words}</w:hdr>')
    passages, _ = read(out.getvalue(), types.DOCX)
    text = "\n".join(passage["text"] for passage in passages)
    assert [line for line in text.splitlines() if line] == [
        "Descale it.",
        "Valid to 2027",
        "Policy 77",
        "2026-0417",
    ]


@pytest.mark.parametrize("type_", [types.MARKDOWN, types.TEXT])
def test_a_picture_in_a_text_is_left_out(type_: str) -> None:
    picture = base64.b64encode(bytes(30_000)).decode()
    passages, _ = read(f"in front ![a pump](data:image/png;base64,{picture}) behind".encode(), type_)
    assert [passage["text"] for passage in passages] == ["in front [a pump] behind"]


def test_html_keeps_tables_lists_and_nested_parts() -> None:
    page = (
        "<html><body>in front<ul><li>one</li><li>two<ul><li>three</li></ul></li></ul>"
        "<table><caption>Errors</caption><tr><th>Code</th><th>Meaning</th></tr>"
        "<tr><td>E04</td><td><p>no</p><p>water | tank</p></td></tr></table>"
        "<pre>a  b\n  c</pre>last<br>line</body></html>"
    )
    passages, _ = read(page.encode(), types.HTML)
    text = "\n".join(passage["text"] for passage in passages)
    for line in ("in front", "- one", "- three", "Errors", "| Code | Meaning |", "a  b\n  c", "last\nline"):
        assert line in text
    assert "| E04 | no water \\| tank |" in text


def test_cells_are_read_as_they_are_shown() -> None:
    rows: list[list[object]] = [
        ["region", "status", "qty", None, "share"],
        ["NA", "NULL", 12, None, 0.5],
        ["EU", "None", None, None, 0.1 + 0.2],
        ["0012", "n/a", 7.0, None, None],
    ]
    passages, _ = read(files.xlsx("Stock", rows), types.XLSX)
    assert [passage["text"] for passage in passages] == [
        "| region | status | qty | share |\n| --- | --- | --- | --- |\n| NA | NULL | 12 | 0.5 |\n"
        "| EU | None |  | 0.3 |\n| 0012 | n/a | 7 |  |"
    ]


def test_one_far_cell_makes_one_row() -> None:
    from openpyxl import Workbook

    book = Workbook()
    book.active["A1"], book.active["B1"] = "near", "x"
    book.active["XFD1048576"] = "far away"
    out = io.BytesIO()
    book.save(out)
    passages, _ = read(out.getvalue(), types.XLSX)
    assert [passage["text"] for passage in passages] == ["| near | x |  |\n| --- | --- | --- |\n|  |  | far away |"]


def test_code_keeps_its_indents() -> None:
    code = "\n".join(" " * 4 * depth + f"depth {depth}" for depth in range(6))
    passages, _ = read(f"```\n{code}\n```\na{' ' * 50}b\n{' ' * 9_000}c".encode(), types.MARKDOWN)
    assert passages[0]["text"] == f"```\n{code}\n```\na{' ' * 8}b\n{' ' * 100}c"


def test_pages_without_text_are_named() -> None:
    lines = parse(files.pdf(["one", "", "", "four"]), types.PDF)
    [warning] = lines[-1].pop("warnings")
    # The rest depends on whether this machine has Tesseract.
    assert warning.startswith("Pages without text: 2, 3. ")
    assert lines[-1] == {"chunks": 2, "pages": 4, "pages_without_text": [2, 3]}


def bomb(part: str) -> bytes:
    """An Office file of a few megabytes whose part is 1 GiB, more than the memory that the parser may use."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        with archive.open(part, "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(b"<a>" + b" " * (1024**2 - 3))
    return out.getvalue()


def table_bomb(rows: int) -> bytes:
    """A workbook that repeats one shared string of 32,000 characters in fifty cells of each of its rows."""
    row = "<row>" + '<c t="s"><v>0</v></c>' * 50 + "</row>"
    main = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    kind = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    parts = {
        "xl/worksheets/sheet1.xml": f"<worksheet {main}><sheetData>{row * rows}</sheetData></worksheet>",
        "xl/sharedStrings.xml": f"<sst {main}><si><t>{'x' * 32_000}</t></si></sst>",
    }
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(files.xlsx("Bomb", []))) as empty,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as workbook,
    ):
        types_ = empty.read("[Content_Types].xml").decode()
        strings = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{kind}"/></Types>'
        parts["[Content_Types].xml"] = types_.replace("</Types>", strings)
        for name in {*empty.namelist(), *parts}:
            workbook.writestr(name, parts.get(name) or empty.read(name))
    return out.getvalue()


def _nested_mail(depth: int) -> bytes:
    return b"".join(b'Content-Type: multipart/mixed; boundary="%d"\n\n--%d\n' % (n, n) for n in range(depth)) + b"\nx"


def _enclosing(depth: int) -> files.Tree:
    inner: files.Tree = files.outlook({"1000001F": "x"}, is_enclosed=True)
    for _ in range(depth):
        inner = files.outlook({}, {"__substg1.0_3701000D": inner}, is_enclosed=True)
    return inner


def _looping_outlook() -> bytes:
    """Each entry of the table of sectors leads to itself."""
    whole = files.compound(files.outlook({"1000001F": "x" * 1000}))
    return whole[:512] + struct.pack("<128I", *range(128)) + whole[1024:]


def _billion_laughs() -> bytes:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        package = f'<!DOCTYPE c [<!ENTITY e0 "ha">{entities}]><c>&e11;<rootfile full-path="&e11;"/></c>'
        archive.writestr("META-INF/container.xml", package)
    return out.getvalue()


def _repeating_book(times: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("META-INF/container.xml", '<container><rootfile full-path="p.opf"/></container>')
        items = '<item id="a" href="a.html" media-type="text/html"/><item id="b" href="b.html" media-type="text/html"/>'
        spine = '<itemref idref="a"/><itemref idref="b"/>' * times
        book.writestr("p.opf", f"<package><manifest>{items}</manifest><spine>{spine}</spine></package>")
        book.writestr("a.html", f"<p>{'some words to read. ' * 10_000}</p>")
    return out.getvalue()


def _changed(archive: bytes, part: str, old: bytes, new: bytes) -> bytes:
    """The archive with a change in one of its parts."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as whole, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as copy:
        assert old in whole.read(part)
        for name in whole.namelist():
            copy.writestr(name, whole.read(name).replace(old, new) if name == part else whole.read(name))
    return out.getvalue()


def _fields(count: int) -> bytes:
    field = b"<w:fldSimple><w:r><w:t>x </w:t></w:r></w:fldSimple>"
    return _changed(files.docx("a", "b"), "word/document.xml", b"<w:p><w:r>", b"<w:p>" + field * count + b"<w:r>")


def _far_row() -> bytes:
    row = b'<row r="1000000000"><c r="A1000000000"><v>1</v></c></row></sheetData>'
    return _changed(files.xlsx("Far", [["a"], ["b"]]), "xl/worksheets/sheet1.xml", b"</sheetData>", row)


def _links() -> bytes:
    link = b'<w:hyperlink w:anchor="' + b"-ref-" * 60_000 + b'"><w:r><w:t>x</w:t></w:r></w:hyperlink>'
    return _changed(files.docx("a", "b"), "word/document.xml", b"<w:p><w:r>", b"<w:p>" + link + b"<w:r>")


def _notes() -> bytes:
    """A Word document that refers to one note three times."""
    namespace = f'xmlns:w="{files.WORD}"'.encode()
    reference = b'<w:r><w:footnoteReference w:id="2"/></w:r>' * 3
    document = _changed(files.docx("a", "b"), "word/document.xml", b"<w:p><w:r>", b"<w:p>" + reference + b"<w:r>")
    word = b"<w:p><w:r><w:t>word</w:t></w:r></w:p>"
    note = b"<w:footnotes " + namespace + b'><w:footnote w:id="2">' + word + b"</w:footnote></w:footnotes>"
    type_ = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/footnotes"
    return _with_parts(
        document,
        {"word/footnotes.xml": note, "word/_rels/document.xml.rels": _relation(type_, "footnotes.xml")},
    )


def _drawings() -> bytes:
    """A workbook whose sheet refers to one drawing three times."""
    paragraph = b"<a:p><a:t>word</a:t></a:p>"
    drawing = b'<a xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main">' + paragraph + b"</a>"
    sheet = "xl/worksheets/_rels/sheet1.xml.rels"
    book = files.xlsx("Drawn", [["a", "b"], ["c", "d"]])
    return _with_parts(book, {"xl/drawing.xml": drawing, sheet: _relation("x/drawing", "../drawing.xml", 3)})


def _slide_rows(count: int) -> bytes:
    """A presentation with a table whose cells span all rows."""
    cell = b"<a:txBody><a:bodyPr/><a:p><a:r><a:t>x</a:t></a:r></a:p></a:txBody><a:tcPr/>"
    rows = (b'<a:tr><a:tc rowSpan="%d">' % count + cell + b"</a:tc></a:tr>") * count
    frame = (
        b'<p:graphicFrame><p:nvGraphicFramePr><p:cNvPr id="9" name="t"/><p:cNvGraphicFramePr/><p:nvPr/>'
        b"</p:nvGraphicFramePr><p:xfrm/><a:graphic>"
        b'<a:graphicData uri="http://schemas.openxmlformats.org/drawingml/2006/table"><a:tbl><a:tblGrid/>'
    )
    table = frame + rows + b"</a:tbl></a:graphicData></a:graphic></p:graphicFrame></p:spTree>"
    return _changed(files.pptx([("a", "b")]), "ppt/slides/slide1.xml", b"</p:spTree>", table)


def _relation(type_: str, target: str, count: int = 1) -> bytes:
    namespace = "http://schemas.openxmlformats.org/package/2006/relationships"
    relation = f'<Relationship Id="r" Type="{type_}" Target="{target}"/>'
    return f'<Relationships xmlns="{namespace}">{relation * count}</Relationships>'.encode()


def _with_parts(archive: bytes, parts: dict[str, bytes]) -> bytes:
    out = io.BytesIO(archive)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as whole:
        for name, content in parts.items():
            whole.writestr(name, content)
    return out.getvalue()


# Built by their test: to build the bombs takes many seconds, and every test process imports this module.
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "html declarations": (lambda: b"<html><body>" + b"<!" * 500_000, types.HTML),
    "html tags": (lambda: b"<html><body>" + b"<a " * 500_000, types.HTML),
    "html depth": (lambda: b"<html><body>" + b"<div>" * 200_000 + b"x", types.HTML),
    "html tables": (lambda: b"<html><body>" + b"<table><tr><td>" * 20_000 + b"x", types.HTML),
    "one line of Markdown": (lambda: b"word " * 1_000_000, types.MARKDOWN),
    "one word": (lambda: b"x" * 5_000_000, types.MARKDOWN),
    "a table rule": (lambda: b"a|b\n" + b"-" * 2_000_000, types.MARKDOWN),
    "a heading": (lambda: b"# " + b"# " * 1_000_000 + b"\n\ntext\n" * 1000, types.MARKDOWN),
    "white space": (lambda: "\u2003".encode() * 1_000_000 + b"end", types.MARKDOWN),
    "docx fields": (lambda: _fields(100_000), types.DOCX),
    "docx links": (_links, types.DOCX),
    "pptx rows": (lambda: _slide_rows(12_000), types.PPTX),
    "docx bomb": (lambda: bomb("word/document.xml"), types.DOCX),
    "xlsx bomb": (lambda: bomb("xl/worksheets/sheet1.xml"), types.XLSX),
    "csv cells": (lambda: b"," * 16_000 + b"x\n" + b"y\n" * 40_000, types.CSV),
    "e-mail depth": (lambda: _nested_mail(3_000), types.MAIL),
    "e-mail parameters": (lambda: b'Content-Type: text/plain; a="' + b'\\";' * 300_000 + b"\n\ntext", types.MAIL),
    "e-mail words": (lambda: b"Subject: " + b"=?utf-8?q?a?= " * 200_000 + b"\n\ntext", types.MAIL),
    "outlook depth": (lambda: files.compound(_enclosing(20)), types.OUTLOOK),
    "outlook loop": (_looping_outlook, types.OUTLOOK),
    "epub bomb": (lambda: bomb("META-INF/container.xml"), types.EPUB),
    "epub entities": (_billion_laughs, types.EPUB),
    "xlsx cells": (lambda: table_bomb(2_000), types.XLSX),
    "xlsx far row": (_far_row, types.XLSX),
    "epub chapters twice": (lambda: _repeating_book(20_000), types.EPUB),
}


@pytest.mark.parametrize(("build", "type_"), ATTACKS.values(), ids=ATTACKS)
def test_a_hostile_file_is_read_or_refused_within_the_limits(
    tmp_path: Path, build: Callable[[], bytes], type_: str
) -> None:
    """The parser is not killed by its limits of processor time and memory, which `parse` would show."""
    lines = parse_apart(tmp_path, build(), type_)
    assert "chunks" in lines[-1] or "error" in lines[-1]


def test_names_that_a_file_gives_are_cleaned_and_cut() -> None:
    parts = b"".join(
        b'--b\nContent-Type: image/x; name="=?utf-8?q?n=00' + b"n" * 5_000 + b'?="\n\nx\n' for _ in range(3)
    )
    mail = b"Subject: =?utf-8?q?a=00b_?= =?zlib?q?c?= " + b"s" * 9_000
    lines = parse(mail + b"\nContent-Type: multipart/mixed; boundary=b\n\n--b\n\ntext\n" + parts, types.MAIL)
    assert lines[-2]["section"].startswith("a b c")
    [warning] = lines[-1]["warnings"]
    assert [len(lines[-2]["section"]), len(warning)] == [2_000, 2_000]
    assert "\0" not in lines[-2]["section"] + warning


def test_a_part_of_a_workbook_that_is_named_as_several_sheets_is_read_once() -> None:
    sheet = b'<sheet xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'
    more = b"".join(sheet + b' name="s%d" sheetId="%d" r:id="rId1"/>' % (n, n + 9) for n in range(3))
    book = _changed(files.xlsx("First", [["a", "b"], ["c", "d"]]), "xl/workbook.xml", b"</sheets>", more + b"</sheets>")
    passages, _ = read(book, types.XLSX)
    assert [passage["section"] for passage in passages] == ["First"]


@pytest.mark.parametrize(("build", "type_"), [(_notes, types.DOCX), (_drawings, types.XLSX)])
def test_a_note_or_drawing_that_a_small_file_names_many_times_is_read_once(
    build: Callable[[], bytes], type_: str
) -> None:
    passages, _ = read(build(), type_)
    assert "\n".join(passage["text"] for passage in passages).count("word") == 1


def test_a_book_that_names_many_missing_parts_has_a_few_warnings() -> None:
    book = _repeating_book(1)
    items = b"".join(b'<item id="m%d" href="m%d" media-type="text/html"/>' % (n, n) for n in range(500))
    spine = b"".join(b'<itemref idref="m%d"/>' % n for n in range(500))
    book = _changed(book, "p.opf", b"</manifest><spine>", items + b"</manifest><spine>" + spine)
    *_, last = parse(book, types.EPUB)
    assert (len(last["warnings"]), last["warnings"][-1]) == (101, "401 more warnings.")
