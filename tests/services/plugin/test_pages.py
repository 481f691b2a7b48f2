"""The text of web pages: encodings, hidden parts, and pages made to cost time."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from services.plugin.tools import pages
from services.plugin.tools.builtin import MAX_PAGE_BYTES
from services.plugin.tools.pages import read_page

LIMIT = 20_000


@pytest.mark.parametrize(
    ("body", "charset", "found"),
    [
        ("<title>A</title><p>Zürich</p>".encode(), None, ("A", "Zürich")),
        ("<meta charset=utf-8><p>Zürich</p>".encode(), None, ("", "Zürich")),
        ("<meta charset=gbk><p>退货</p>".encode("gbk"), None, ("", "退货")),
        ("<meta charset=gbk><p>退货</p>".encode(), "utf-8", ("", "退货")),
        ("\ufeff<p>退货</p>".encode("utf-16"), None, ("", "退货")),
        ('<?xml version="1.0" encoding="iso-8859-1"?><p>é</p>'.encode(), "utf-8", ("", "é")),
        (b"<p>caf\xe9</p>", "nonsense", ("", "caf\ufffd")),
        (b"<p>caf\xe9</p>", "undefined", ("", "caf\ufffd")),
        (b"<p>a\0b</p>", None, ("", "a b")),
        (b"", None, ("", "")),
        (b"   ", None, ("", "")),
        (b"<!-- only a comment -->", None, ("", "")),
        (b"just text & more", None, ("", "just text & more")),
        (b"<p>a<b>b</b>c</p><svg><text>no</text></svg>tail", None, ("", "a\nb\nc\ntail")),
        (b"<body><noscript>no</noscript><template>no</template>yes", None, ("", "yes")),
    ],
)
def test_a_page_is_read(body: bytes, charset: str | None, found: tuple[str, str]) -> None:
    assert read_page(body, charset, LIMIT) == found


def test_reading_stops_at_the_limit() -> None:
    _, text = read_page(b"<p>" + b"word <b>x</b>" * 100_000, None, LIMIT)
    assert len(text) == LIMIT + 1
    assert read_page(b"<p>" + b"x" * MAX_PAGE_BYTES, None, LIMIT) == ("", "x" * (LIMIT + 1))


@pytest.mark.parametrize(
    "piece",
    [
        *(b"<a ", b"<!", b"<", b"</", b"&", b"&#1", b"<a b=", b"<a b='", b"<!--", b"<![CDATA[", b"<?", b"<div>"),
        *(b"<p>", b"<table>", b"<b><i></b>", b"<select><option>", b"<font><p>", b"</p>", b"<script>", b"<svg>"),
    ],
)
def test_a_page_made_to_cost_time_is_read(piece: bytes) -> None:
    """A parser of quadratic time needs hours for one of these pages, and this test would reach its time-out."""
    read_page(piece * (MAX_PAGE_BYTES // len(piece)), None, LIMIT)


def _with_attributes(count: int) -> bytes:
    """The parser compares each attribute of a tag with all others: of 150,000 it takes more than a minute."""
    return b"<p " + b" ".join(b"a%d" % n for n in range(count)) + b">text"


async def test_a_page_is_read_in_a_process_of_its_own_which_ends_at_its_limits() -> None:
    assert await pages.read("text/html", _with_attributes(10), None, LIMIT) == ("", "text")
    assert await pages.read("text/plain", b"<p>", None, LIMIT) == ("", "<p>")
    with pytest.raises(pages.UnreadablePage):
        await pages.read("text/html", _with_attributes(150_000), None, LIMIT)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await pages.read("text/html", _with_attributes(150_000), None, LIMIT)
    assert [child for child in _children() if b"tools.pages" in child] == []


def _children() -> list[bytes]:
    ids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{id_}/cmdline").read_bytes() for id_ in ids]


def _become(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Lets the program run as the process of a page."""
    start = asyncio.create_subprocess_exec

    async def instead(python: str, *_: str, **more: Any) -> asyncio.subprocess.Process:
        return await start(python, "-c", program, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", instead)


async def test_the_largest_text_passes() -> None:
    page = "<title>" + "😀" * 300 + "</title><p>" + "😀" * 2 * LIMIT
    assert await pages.read("text/html", page.encode(), None, LIMIT) == ("😀" * 300, "😀" * (LIMIT + 1))


async def test_a_process_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    _become(monkeypatch, """import sys; sys.stdout.buffer.write(b'["t", "' + b'x' * 2**26)""")
    tracemalloc.start()
    try:
        with pytest.raises(pages.UnreadablePage):
            await pages.read("text/html", b"<p>", None, LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024**2
    finally:
        tracemalloc.stop()
    assert [child for child in _children() if b"sys.stdout" in child] == []


@pytest.mark.parametrize("said", ['["t", "x"]', '["t", 1, []]', "7", '["t", "\\xff", []]', "[" * 5_000, ""])
async def test_a_process_that_says_something_else_is_not_believed(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    _become(monkeypatch, f"import sys\nsys.stdout.buffer.write({said.encode('latin-1')!r})")
    with pytest.raises(pages.UnreadablePage):
        await pages.read("text/html", b"<p>" * MAX_PAGE_BYTES, None, LIMIT)


async def test_protections_that_the_machine_does_not_allow_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    log = Mock()
    _become(monkeypatch, """print('["t", "x", ["seccomp"]]')""")
    monkeypatch.setattr(pages, "_log", log)
    assert await pages.read("text/html", b"<p>", None, LIMIT) == ("t", "x")
    log.warning.assert_called_once_with("page process is not fully confined", missing=["seccomp"])
