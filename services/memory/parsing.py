"""Parses a document's file into passages, in its own process: ``python -m services.memory.parsing FILE TYPE``.

A hostile file can crash its parser, exhaust memory or never end. It affects only this process, which has neither the
service's environment nor its event loop. The output is one JSON object per line: ``{"error"}``, or
``{"parsed": true}``, then ``{"text","section","page","tokens"}`` for each passage, then ``{"chunks": n}``.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

import msgspec

from infra.stores import filetypes as types
from services.memory.domain import Block, Chunk, chunk, sections

MAX_MEMORY_BYTES = 3 * 1024**3
_KINDS = {types.PDF: "PDF", types.DOCX: "Word document", types.XLSX: "spreadsheet", types.PPTX: "presentation"}
_ENDINGS = {types.DOCX: ".docx", types.XLSX: ".xlsx", types.PPTX: ".pptx", types.HTML: ".html"}
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_SPACES = re.compile(r"[ \t\u00a0]{9,}")
_EMPTY_LINES = re.compile(r"\n\s*\n\s*\n")
_SLIDE = re.compile(r"<!-- Slide number: (\d+) -->")


class Unreadable(Exception):
    """The file cannot be read. The message gives the reason to the person who uploaded it."""


def read(path: str, type_: str) -> Iterator[Block]:
    """The text of a file of this MIME type. Raises Unreadable."""
    if type_ == types.PDF:
        yield from _pdf(path)
    elif type_ in (types.TEXT, types.MARKDOWN):
        text = _decoded(path)
        yield from sections(text) if type_ == types.MARKDOWN else [Block(text)]
    elif type_ == types.PPTX:
        # [text before the first slide, number, text, number, text …]
        _, *slides = _SLIDE.split(_converted(path, type_))
        for number, text in zip(slides[::2], slides[1::2], strict=True):
            for block in sections(text):
                yield block._replace(page=int(number))
    else:
        yield from sections(_converted(path, type_))


def _converted(path: str, type_: str) -> str:
    from markitdown import MarkItDown, StreamInfo

    info = StreamInfo(mimetype=type_, extension=_ENDINGS[type_])
    with open(path, "rb") as file:
        return _clean(MarkItDown(enable_plugins=False).convert_stream(file, stream_info=info).markdown)


def _pdf(path: str) -> Iterator[Block]:
    # markitdown does not give page numbers.
    from pypdfium2 import PdfDocument, PdfiumError  # type: ignore[import-untyped]

    try:
        document = PdfDocument(path)
    except PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("The PDF is encrypted. Upload it without a password.") from error
        raise
    for number in range(len(document)):
        page = document[number]
        words = page.get_textpage()
        yield Block(_clean(words.get_text_bounded()), None, number + 1)
        words.close()
        page.close()


def _decoded(path: str) -> str:
    from charset_normalizer import from_bytes

    with open(path, "rb") as file:
        content = file.read()
    with suppress(UnicodeDecodeError):
        return _clean(content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"))
    # A sample is enough for the guess, and the file may be large.
    guess = from_bytes(content[:65_536]).best()
    return _clean(content.decode(guess.encoding if guess else "latin-1", errors="replace"))


def _clean(text: str) -> str:
    text = _NOT_TEXT.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _EMPTY_LINES.sub("\n\n", _SPACES.sub(" " * 8, text))


def passages(path: str, type_: str) -> Iterator[Chunk]:
    """The file's passages. Raises Unreadable, also if the file has no text."""
    try:
        yield from _some(chunk(read(path, type_)))
    except (Unreadable, ImportError):
        raise
    except MemoryError as error:
        raise Unreadable("The file needs too much memory to be read.") from error
    except Exception as error:
        kind = _KINDS.get(type_, "text")
        raise Unreadable(f"The file cannot be read as a {kind}; it may be damaged.") from error


def _some(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    empty = True
    for each in chunks:
        empty = False
        yield each
    if empty:
        raise Unreadable("The file has no text, or is damaged. Text in images, such as scans, is not read.")


def main() -> None:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    encoder = msgspec.json.Encoder()

    def say(line: object) -> None:
        sys.stdout.buffer.write(encoder.encode(line) + b"\n")

    count = 0
    try:
        for count, found in enumerate(passages(*sys.argv[1:]), 1):
            if count == 1:
                say({"parsed": True})
            say(found._asdict())
        say({"chunks": count})
    except Unreadable as error:
        say({"error": str(error)})
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
