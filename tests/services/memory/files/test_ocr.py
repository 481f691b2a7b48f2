"""Text is recognised in the pages of a PDF that have none. The system's Tesseract is optional."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.stores import filetypes as types
from services.memory.domain import UnreadableFile
from services.memory.files import ocr
from services.memory.files.parsing import BlockReader, passages
from services.memory.files.pdf import MAX_PIXELS
from tests.services.memory import files
from tooling.stack.checkout import CHECKOUT

WORDS = "The emergency valve opens at 14 bar and is painted violet."
PAGES = [WORDS, "", "紧急阀门在十四巴时打开，并漆成紫色。"]


class Scripted(ocr.Recognizer):
    """Gives these texts, one after the other, and notes the sizes of the bitmaps."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.sizes: list[tuple[int, int]] = []

    def text(self, bitmap: bytes, width: int, height: int, stride: int) -> str:
        assert len(bitmap) >= (height - 1) * stride + width
        self.sizes.append((width, height))
        return self.texts.pop(0)


def read(content: bytes, recognizer: ocr.Recognizer | None) -> tuple[list[tuple[str, int | None]], BlockReader]:
    reader = BlockReader(io.BytesIO(content), types.PDF, recognizer)
    return [(chunk.text, chunk.page) for chunk in passages(reader, types.PDF)], reader


def test_only_pages_without_text_are_recognised_and_named_as_such() -> None:
    recognizer = Scripted("First.", " \n")
    found, reader = read(files.scan(PAGES), recognizer)
    assert found == [("First.", 1), ("This page has text.", 2)]
    assert reader.pages_without_text == [3]
    assert reader.warnings == [
        "Pages whose text was recognised in images and may have mistakes: 1.",
        "Pages without text: 3. In images text is recognised for at most 300 s.",
    ]


def test_a_page_of_any_size_is_drawn_within_the_limit() -> None:
    huge = files.pdf([""]).replace(b"[0 0 2000 792]", b"[0 0 14400 9]")
    recognizer = Scripted("found")
    assert read(huge, recognizer)[0] == [("found", 1)]
    [(width, height)] = recognizer.sizes
    assert width == MAX_PIXELS
    assert height <= 3


def test_without_tesseract_a_scan_is_refused_with_the_reason() -> None:
    with pytest.raises(UnreadableFile, match="Text in images, such as scans, is not read"):
        read(files.pdf([""]), None)
    with pytest.raises(UnreadableFile, match="is recognised for at most 300 s"):
        read(files.pdf([""]), Scripted(""))


@pytest.fixture
def recognizer() -> ocr.Recognizer:
    found = ocr.load()
    if found is None:
        pytest.skip("this machine has no Tesseract with English")
    return found


def test_when_the_time_of_the_file_is_over_pages_stay_without_text(
    recognizer: ocr.Recognizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = files.scan(PAGES[:2])
    assert [page for _, page in read(content, recognizer)[0]] == [1, 2]
    monkeypatch.setattr(recognizer, "_deadline", 0.0)
    assert [page for _, page in read(content, recognizer)[0]] == [2]


def test_a_scan_is_read_by_the_confined_parser(recognizer: ocr.Recognizer, tmp_path: Path) -> None:
    path = tmp_path / "scan.pdf"
    path.write_bytes(files.scan(PAGES))
    with path.open("rb") as file:
        done = subprocess.run(
            [sys.executable, "-m", "services.memory.files.parsing", types.PDF, str(os.getpid())],
            stdin=file,
            cwd=CHECKOUT,
            # Tesseract may be in a folder of its own.
            env=os.environ | {"PYTHONUTF8": "1"},
            capture_output=True,
            check=True,
        )
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    texts = {line["page"]: " ".join(line["text"].split()) for line in lines if "text" in line}
    assert texts[1] == WORDS
    assert texts[2] == "This page has text."
    if 3 in texts:
        # Chinese is another package of the system.
        assert "十四巴时打开" in texts[3]
