"""Finds the MIME type of a file by its content.

The file's name decides only between types whose content looks the same: Markdown, CSV, e-mail, parts of HTML pages and
plain text; Outlook's e-mail and other files of old Office programs.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from typing import IO, cast

from infra.errors import InvalidMessage
from infra.stores.charsets import wide_encoding

_OPEN_XML = "application/vnd.openxmlformats-officedocument"
PDF = "application/pdf"
DOCX = f"{_OPEN_XML}.wordprocessingml.document"
XLSX = f"{_OPEN_XML}.spreadsheetml.sheet"
PPTX = f"{_OPEN_XML}.presentationml.presentation"
OFFICE = (DOCX, XLSX, PPTX)
OLD_OFFICE = "application/x-ole-storage"
OUTLOOK = "application/vnd.ms-outlook"
RTF = "application/rtf"
ZIP = "application/zip"
EPUB = "application/epub+zip"
HTML = "text/html"
CSV = "text/csv"
MAIL = "message/rfc822"
MARKDOWN = "text/markdown"
TEXT = "text/plain"
TEXTS = (TEXT, MARKDOWN, CSV, MAIL)
UNKNOWN = "application/octet-stream"

_HEAD_BYTES = 65_536
# Types by their first bytes. RIFF and ISO media files need more bytes, see below.
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OLD_OFFICE),
    (b"{\\rtf", RTF),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
    (b"\xff\xf3", "audio/mpeg"),
    (b"\xff\xf2", "audio/mpeg"),
    (b"#!AMR", "audio/amr"),
    (b"\x1a\x45\xdf\xa3", "video/webm"),
)
_RIFF = {b"WEBP": "image/webp", b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo"}
_ISO_MEDIA = {b"M4A ": "audio/mp4", b"heic": "image/heic", b"mif1": "image/heif", b"avif": "image/avif"}
_OFFICE_FOLDERS = {"word": DOCX, "xl": XLSX, "ppt": PPTX}
# A comment ends at its first -->. If it could end later, too, each comment would double the work for another text.
_HTML = re.compile(
    rb"(?i)\s*(?:<!--(?:(?!-->).)*-->\s*|<\?xml[^>]*>\s*)*<(?:(!doctype\s+html|html|head|body)|"
    rb"meta|title|style|script|link|table|div)\b",
    re.DOTALL,
)
EXTENSIONS = {
    MARKDOWN: (".md", ".markdown"),
    CSV: (".csv", ".tsv"),
    MAIL: (".eml", ".mht", ".mhtml"),
    OUTLOOK: (".msg",),
}
"""The extensions that tell types apart. The first one of each type is the usual one."""
_NAMED = {extension: type_ for type_, extensions in EXTENSIONS.items() for extension in extensions}
_NAMED |= dict.fromkeys((".html", ".htm", ".xhtml"), HTML)
# Of tens of thousands of parts.
MAX_DIRECTORY_BYTES = 4 * 1024**2
# A field of an e-mail's head, perhaps after the line with which mailboxes separate their e-mails.
_MAIL = re.compile(rb"(?:From [^\n]*\n)?[!-9;-~]{1,76}:")
# Control characters that no text has.
_BINARY = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def content_type(file: IO[bytes], name: str) -> str:
    """The MIME type of `file`, which must be seekable; ``application/octet-stream`` for an unknown type.

    Raises InvalidMessage (field ``file``) for an archive that is damaged or has too many parts.
    """
    file.seek(0)
    head = file.read(_HEAD_BYTES)
    for magic, type_ in _MAGIC:
        if head.startswith(magic):
            return OUTLOOK if type_ == OLD_OFFICE and _named(name) == OUTLOOK else type_
    if head.startswith(b"RIFF"):
        return _RIFF.get(head[8:12], UNKNOWN)
    if head[4:8] == b"ftyp":
        return _ISO_MEDIA.get(head[8:12], "video/mp4")
    # Readers accept a PDF whose header lies anywhere in the first kilobyte.
    if b"%PDF-" in head[:1024]:
        return PDF
    if head.startswith(b"PK\x03\x04"):
        return _archive(file)
    return _text(head, name)


class _Archive:
    """A file whose list of parts is read only up to a size: in memory it is ten times as large."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise InvalidMessage("file", "is a zip archive of too many parts")
        return self._file.read(size)


def _archive(file: IO[bytes]) -> str:
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Archive(file))) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InvalidMessage("file", "is a damaged zip archive") from error
    if "[Content_Types].xml" in names:
        folders = {name.partition("/")[0] for name in names}
        for folder, type_ in _OFFICE_FOLDERS.items():
            if folder in folders:
                return type_
    return EPUB if "META-INF/container.xml" in names else ZIP


def _text(head: bytes, name: str) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        head = head.decode("utf-32", "replace").encode()
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        head = head.decode("utf-16", "replace").encode()
    elif wide := wide_encoding(head):
        head = head.decode(wide, "replace").encode()
    # Text need not be UTF-8: much Chinese text is GB18030.
    if _BINARY.search(head):
        return UNKNOWN
    type_ = _named(name)
    page = _HTML.match(head.removeprefix(codecs.BOM_UTF8))
    # Markdown may begin with a part of a page.
    if type_ == HTML or (page and (page[1] or type_ is None)):
        return HTML
    if type_ == MAIL and not _MAIL.match(head.removeprefix(codecs.BOM_UTF8)):
        return TEXT
    return type_ if type_ in TEXTS else TEXT


def _named(name: str) -> str | None:
    return _NAMED.get("." + name.lower().rpartition(".")[2])
