"""Every accepted type of file, read in the parser's own process like in the service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.stores import filetypes as types
from tests.services.memory import files
from tooling.stack.checkout import CHECKOUT


def read(folder: Path, content: bytes, type_: str) -> tuple[list[dict[str, Any]], str | None]:
    """The passages, or the reason why there are none."""
    path = folder / "file"
    path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-m", "services.memory.parsing", str(path), type_],
        cwd=CHECKOUT,
        env={"PYTHONUTF8": "1"},
        capture_output=True,
        check=True,
        timeout=60,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    passages = [line for line in lines if "text" in line]
    error = next((line["error"] for line in lines if "error" in line), None)
    assert error or lines[-1] == {"chunks": len(passages)}
    return passages, error


def test_markdown_keeps_its_headings(tmp_path: Path) -> None:
    passages, _ = read(tmp_path, files.handbook("en"), types.MARKDOWN)
    [descaling] = [passage for passage in passages if "(order number 7710)" in passage["text"]]
    assert descaling["section"] == "Norrland Linnea 2 – Owner's Handbook > Cleaning and care > Descaling"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
def test_plain_text_in_the_encodings_of_the_world(tmp_path: Path, encoding: str) -> None:
    text = "机器按照设定的硬度计算用水量，到时会提示除垢。只能使用原厂的液体除垢剂。" * 3
    passages, _ = read(tmp_path, text.encode(encoding), types.TEXT)
    assert passages[0]["text"] == text


def test_a_pdf_page_by_page_in_english_and_chinese(tmp_path: Path) -> None:
    content = files.pdf(["The warranty is 30 months.", "保修期为三十个月。"])
    passages, _ = read(tmp_path, content, types.PDF)
    assert [(passage["text"], passage["page"]) for passage in passages] == [
        ("The warranty is 30 months.", 1),
        ("保修期为三十个月。", 2),
    ]


def test_a_sentence_that_a_page_breaks_off_is_whole_on_the_next(tmp_path: Path) -> None:
    content = files.pdf(["Keep the receipt. The warranty is", "30 months."])
    passages, _ = read(tmp_path, content, types.PDF)
    assert [passage["text"] for passage in passages] == [
        "Keep the receipt. The warranty is",
        "The warranty is\n30 months.",
    ]


def test_html_without_its_scripts(tmp_path: Path) -> None:
    page = "<html><body><h1>Returns</h1><script>let x = 1</script><p>Within 45 days &amp; unused.</p></body></html>"
    passages, _ = read(tmp_path, page.encode(), types.HTML)
    assert [(passage["text"], passage["section"]) for passage in passages] == [("Within 45 days & unused.", "Returns")]


def test_a_word_document(tmp_path: Path) -> None:
    passages, _ = read(tmp_path, files.docx("Returns", "Within 45 days."), types.DOCX)
    assert "Within 45 days." in passages[-1]["text"]


def test_a_presentation_slide_by_slide(tmp_path: Path) -> None:
    content = files.pptx([("Warranty", "30 months"), ("退货", "45 天之内")])
    passages, _ = read(tmp_path, content, types.PPTX)
    assert [(passage["text"], passage["section"], passage["page"]) for passage in passages] == [
        ("30 months", "Warranty", 1),
        ("45 天之内", "退货", 2),
    ]


def test_every_passage_of_a_long_table_has_the_header(tmp_path: Path) -> None:
    rows = [["Code", "Meaning"], *([f"E{n:03}", f"Something about valve number {n} is wrong"] for n in range(100))]
    passages, _ = read(tmp_path, files.xlsx("Errors", rows), types.XLSX)
    assert len(passages) > 5
    assert all(passage["text"].startswith("| Code | Meaning |") for passage in passages)
    assert {passage["section"] for passage in passages} == {"Errors"}


@pytest.mark.parametrize(
    ("content", "type_", "reason"),
    [
        (files.pdf(["secret"], encrypted=True), types.PDF, "encrypted"),
        (files.pdf(["cut"])[:300], types.PDF, "PDF; it may be damaged"),
        (files.pdf([""]), types.PDF, "has no text"),
        (files.damaged(files.docx("a", "b"), "word/document.xml"), types.DOCX, "has no text, or is damaged"),
        (files.damaged(files.xlsx("a", [["b"]]), "xl/workbook.xml"), types.XLSX, "spreadsheet; it may be damaged"),
        (b" \n\n\t ", types.TEXT, "has no text"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_reason(tmp_path: Path, content: bytes, type_: str, reason: str) -> None:
    passages, error = read(tmp_path, content, type_)
    assert passages == []
    assert error is not None
    assert reason in error
