"""Parses a document into passages, in its own process: ``python -m services.memory.files.parsing TYPE PARENT < FILE``.

A hostile file can crash its parser, exhaust memory, never end, or take the parser over. It affects only this process,
which `confinement` has cut off from the machine. The output is one JSON object per line: ``{"error"}``, or
``{"parsed": true}``, then ``{"text","section","page","tokens"}`` for each passage, then
``{"chunks": n, "pages", "pages_without_text", "warnings"}``. A first line ``{"unconfined": […]}`` names the
protections that the machine does not allow.
"""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import IO, Protocol

import msgspec

from infra.security import confinement
from infra.stores import charsets
from infra.stores import filetypes as types
from infra.web import data_urls
from services.memory.domain import DAMAGED, Block, Chunk, UnreadableFile, chunk, folded, sections
from services.memory.files import ebooks, mail, markup, ocr, outlook, pdf, slides, spreadsheets, strict, word

# A larger archive is refused before it is unpacked. Real ones are compressed ten times at most.
MAX_UNPACKED_BYTES = 512 * 1024**2
# Each passage repeats the path of its headings. A subject or the name of a sheet may have any length.
MAX_SECTION = 2_000
MAX_WARNINGS, MAX_WARNING = 100, 2_000
MAX_LISTED_PAGES = 10_000
"""Of those without text. A list of documents shows them for each."""

_KINDS = {
    types.PDF: "PDF",
    types.DOCX: "Word document",
    types.XLSX: "spreadsheet",
    types.PPTX: "presentation",
    types.CSV: "table (CSV)",
    types.EPUB: "e-book",
    types.MAIL: "e-mail",
    types.OUTLOOK: "e-mail of Outlook",
    types.OLD_OFFICE: "file of Office",
}
_LIBRARIES = {types.PDF: "pypdfium2", types.DOCX: "mammoth", types.XLSX: "openpyxl", types.PPTX: "pptx"}
_ARCHIVES = (types.DOCX, types.XLSX, types.PPTX, types.EPUB)
# Programs of Visual Basic, and sheets with those of Excel 4.
_MACROS = re.compile(r"/(?:vbaProject\.bin$|macrosheets/)")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_SPACES = re.compile(r"(?<=\S)[^\S\n]{9,}")
# Before a line. Code is indented far, and no text that far.
MAX_INDENT = 100
_INDENT = re.compile(rf"^[^\S\n]{{{MAX_INDENT + 1},}}", re.MULTILINE)
_EMPTY_LINES = re.compile(r"\n\s*\n\s*\n")
# Lines of the properties before a Markdown text: one begins with a name, or is a part of the value before it.
_PROPERTY = re.compile(r"[\w.-]+[ \t]*[:=](?!//)")
_PROPERTY_PART = re.compile(r"[ \t#\[\]}-]|$")
_TITLE = re.compile(r"title[ \t]*[:=]([^|>].*)", re.IGNORECASE)
_FIRST_LEVEL = re.compile(r"^(?:# |=+[ \t]*$)", re.MULTILINE)


class Decoder(Protocol):
    def __call__(self, content: bytes, /) -> tuple[str, str]: ...


class BlockReader:
    """Reads one file of a MIME type. `pages`, `pages_without_text` and `warnings` are complete after the last block."""

    def __init__(self, file: IO[bytes], type_: str, recognizer: ocr.Recognizer | None = None) -> None:
        self._file = file
        self._type = type_
        self._recognizer = recognizer
        self._recognized: list[int] = []
        self.images = (
            f"In images text is recognised for at most {ocr.FILE_SECONDS:g} s."
            if recognizer
            else "Text in images, such as scans, is not read."
        )
        """Says whether text in images is read."""
        self.pages: int | None = None
        self.pages_without_text: list[int] = []
        self.warnings: list[str] = []

    def blocks(self) -> Iterator[Block]:
        """The text of the file. Raises UnreadableFile."""
        if self._type in _ARCHIVES:
            self._check_archive()
        match self._type:
            case types.PDF:
                headers: dict[str, tuple[int, str]] = {}
                texts = pdf.pages(self._file, self._recognizer, self._recognized, headers)
                yield from self._page_blocks([Block(_clean(text))] for text in texts)
                for page, lines in groupby(headers.values(), itemgetter(0)):
                    yield Block(_clean("\n".join(line for _, line in lines)), page=page, continues=False)
            case types.PPTX:
                found = (sections(_clean(text)) for text in slides.texts(self._file))
                yield from self._page_blocks([block._replace(continues=False) for block in slide] for slide in found)
            case types.XLSX:
                for block in spreadsheets.sheets(self._file, self.warnings):
                    yield block._replace(text=_clean(block.text))
            case types.DOCX:
                yield from sections(_clean(markup.markdown(word.html(self._file))))
                if margins := word.margins(self._file):
                    yield Block(_clean(margins))
            case types.EPUB:
                for block in ebooks.blocks(self._file, self.warnings):
                    yield block._replace(text=_clean(block.text))
            case types.MAIL:
                for block in mail.blocks(self._file, self.warnings):
                    yield block._replace(text=_clean(block.text))
            case types.OUTLOOK:
                for block in outlook.blocks(self._file, self.warnings):
                    yield block._replace(text=_clean(block.text))
            case types.OLD_OFFICE:
                raise UnreadableFile(outlook.refusal(self._file))
            case types.RTF:
                raise UnreadableFile("The file is in RTF. Save it as .docx and upload that.")
            case types.CSV:
                yield from spreadsheets.text_table(_clean(self._decoded(charsets.decode)))
            case types.HTML:
                yield from sections(_clean(self._decoded(partial(markup.html_markdown, titled=True))))
            case types.MARKDOWN:
                yield from sections(_titled(_clean(self._decoded(charsets.decode))))
            case _:
                yield Block(_clean(self._decoded(charsets.decode)))
        if self._recognized:
            shown = _listed(self._recognized)
            self.warnings.append(f"Pages whose text was recognised in images and may have mistakes: {shown}.")
        if self.pages_without_text:
            self.warnings.append(f"Pages without text: {_listed(self.pages_without_text)}. {self.images}")

    def _check_archive(self) -> None:
        with zipfile.ZipFile(self._file) as archive:
            if self._type in types.OFFICE and any(map(_MACROS.search, archive.namelist())):
                raise UnreadableFile("The file has macros. Upload it without them, as .docx, .xlsx or .pptx.")
            # The sizes that the directory states: the unpacker does not go beyond them.
            if sum(part.file_size for part in archive.infolist()) > MAX_UNPACKED_BYTES:
                raise UnreadableFile(
                    f"The file is larger than {MAX_UNPACKED_BYTES // 1024**2} MiB when it is unpacked."
                )
            if self._type in types.OFFICE:
                self._file = strict.transitional(self._file, archive)
        self._file.seek(0)

    def _page_blocks(self, pages: Iterable[list[Block]]) -> Iterator[Block]:
        """The blocks of all pages with their page's number."""
        self.pages = 0
        for blocks in pages:
            self.pages += 1
            if not any(block.text.strip() for block in blocks):
                self.pages_without_text.append(self.pages)
            for block in blocks:
                yield block._replace(page=self.pages)

    def _decoded(self, decode: Decoder) -> str:
        try:
            text, encoding = decode(self._file.read())
        except charsets.UnknownEncoding:
            raise UnreadableFile(
                "The character encoding of the text is not recognised. Save the file as UTF-8."
            ) from None
        if encoding not in ("utf-8", "utf-16", "utf-32"):
            self.warnings.append(f"The text was read in the character encoding {encoding}.")
        if "\ufffd" in text:
            self.warnings.append(DAMAGED)
        return text


def _listed(pages: Sequence[int]) -> str:
    return ", ".join(map(str, pages[:20])) + (", …" if len(pages) > 20 else "")


def _titled(text: str) -> str:
    """A Markdown text without the properties before it (YAML, TOML). Their title is its first heading, if it has none
    of the first level."""
    sign = text[:4].rstrip()
    if sign not in ("---", "+++"):
        return text
    _, *lines = text.split("\n")
    count = 0
    while count < len(lines) and (_PROPERTY.match(lines[count]) or (count and _PROPERTY_PART.match(lines[count]))):
        if lines[count].rstrip() == sign:
            break
        count += 1
    if not count or count == len(lines) or lines[count].rstrip() not in (sign, "..."):
        return text
    titles = (found[1].strip(" \t'\"") for line in lines[:count] if (found := _TITLE.fullmatch(line)))
    title, text = next(titles, ""), "\n".join(lines[count + 1 :])
    return text if not title or _FIRST_LEVEL.search(text) else f"# {title}\n\n{text}"


def _clean(text: str) -> str:
    text = data_urls.named(text)
    text = _NOT_TEXT.sub(" ", folded(text).replace("\r\n", "\n").replace("\r", "\n"))
    text = _INDENT.sub(" " * MAX_INDENT, _SPACES.sub(" " * 8, text))
    return _EMPTY_LINES.sub("\n\n", text)


def passages(reader: BlockReader, type_: str) -> Iterator[Chunk]:
    """The file's passages. Raises UnreadableFile, also if the file has no text."""
    blocks = (block._replace(section=_clean(block.section or "")[:MAX_SECTION] or None) for block in reader.blocks())
    try:
        yield from _some(chunk(blocks), reader)
    except (UnreadableFile, ImportError):
        raise
    except MemoryError as error:
        raise UnreadableFile("The file needs too much memory to be read.") from error
    except Exception as error:
        kind = _KINDS.get(type_, "text")
        raise UnreadableFile(f"The file cannot be read as a {kind}; it may be damaged.") from error


def _told(warnings: Sequence[str]) -> list[str]:
    """The warnings, which may have names that the file gives."""
    told = [_clean(warning)[:MAX_WARNING] for warning in warnings[:MAX_WARNINGS]]
    return told if len(warnings) <= MAX_WARNINGS else [*told, f"{len(warnings) - MAX_WARNINGS} more warnings."]


def _some(chunks: Iterable[Chunk], reader: BlockReader) -> Iterator[Chunk]:
    empty = True
    for each in chunks:
        empty = False
        yield each
    if empty:
        raise UnreadableFile(f"The file has no text, or is damaged. {reader.images}")


def answer(file: IO[bytes], type_: str, recognizer: ocr.Recognizer | None) -> Iterator[dict[str, object]]:
    """The lines of the output about this file."""
    count = 0
    reader = BlockReader(file, type_, recognizer)
    try:
        for count, found in enumerate(passages(reader, type_), 1):
            if count == 1:
                yield {"parsed": True}
            yield found._asdict()
        yield {
            "chunks": count,
            "pages": reader.pages,
            "pages_without_text": reader.pages_without_text[:MAX_LISTED_PAGES],
            "warnings": _told(reader.warnings),
        }
    except UnreadableFile as error:
        yield {"error": str(error)}


def main(type_: str, parent: str) -> None:
    recognizer = ocr.load() if type_ == types.PDF else None
    confinement.limit(confinement.MAX_CPU_SECONDS + (int(ocr.FILE_SECONDS) if recognizer else 0))
    # Everything is imported now: the confined process may be unable to read Python's files.
    charsets.preload()
    if library := _LIBRARIES.get(type_):
        importlib.import_module(library)
    missing = confinement.confine(int(parent))
    encoder = msgspec.json.Encoder()

    def say(line: object) -> None:
        sys.stdout.buffer.write(encoder.encode(line) + b"\n")

    if missing:
        say({"unconfined": missing})
    for line in answer(sys.stdin.buffer, type_, recognizer):
        say(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
