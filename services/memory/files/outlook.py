"""Reads an e-mail of Outlook (``.msg``, MS-OXMSG): subject, people, date and text, and the e-mails that it encloses.

Each message is a storage of a compound file; each of its properties is a stream, or a row in the stream of properties.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import IO

from olefile import OleFileIO  # type: ignore[import-untyped]

from infra.stores.charsets import UnknownEncoding, decode
from services.memory.domain import Block, UnreadableFile, sections
from services.memory.files.mail import LONGER, MAX_HEADER, note_attachments
from services.memory.files.markup import html_markdown, markdown

# Tags of MS-OXPROPS, in hexadecimal; with the type if only one is read.
_CLASS, _SUBJECT, _TO, _CC, _SENDER, _SENDER_ADDRESS = "001A", "0037", "0E04", "0E03", "0C1A", "5D01"
_BODY, _HTML_BYTES, _RTF = "1000", "10130102", "10090102"
_FILE_NAMES = ("3707", "3704")
_ENCLOSED = "3701000D"
_SENT, _CODE_PAGE = 0x00390040, 0x3FFD0003
_ENCRYPTED = "IPM.Note.SMIME"
_YEAR_1601 = datetime(1601, 1, 1, tzinfo=UTC)

Place = tuple[str, ...]
"""The path of a storage."""


def refusal(file: IO[bytes]) -> str:
    """Why a compound file other than an e-mail cannot be read."""
    with OleFileIO(file) as storage:
        if storage.exists("EncryptedPackage"):
            return "The file is encrypted. Upload it without a password."
    return "The file is of Office before 2007. Save it as .docx, .xlsx or .pptx and upload that."


def blocks(file: IO[bytes], warnings: list[str]) -> Iterator[Block]:
    """The e-mail under its subject, then the enclosed ones. Adds the parts that are not read to `warnings`.
    Raises UnreadableFile, UnknownEncoding, and errors of its library if the file is damaged."""
    with OleFileIO(file) as storage:
        folders: dict[Place, list[str]] = defaultdict(list)
        for *parent, name in storage.listdir(streams=True, storages=True):
            folders[tuple(parent)].append(name)
        attached: list[str] = []
        waiting: list[Place] = [()]
        while waiting:
            place = waiting.pop()
            message = _Storage(storage, place, folders[place])
            if message.line(_CLASS) == _ENCRYPTED:
                raise UnreadableFile("The e-mail is encrypted. Upload it without encryption.")
            yield from _own_blocks(message, warnings)
            enclosed = []
            for name in folders[place]:
                if name.startswith("__attach_version1.0_"):
                    attachment = _Storage(storage, (*place, name), folders[*place, name])
                    if attachment.has(_ENCLOSED):
                        enclosed.append((*attachment.place, f"__substg1.0_{_ENCLOSED}"))
                    else:
                        names = (attachment.line(tag) for tag in _FILE_NAMES)
                        attached.append(next(filter(None, names), "a file without a name"))
            waiting += reversed(enclosed)
        note_attachments(attached, warnings)


class _Storage:
    """The properties of a message or of an attachment."""

    def __init__(self, storage: OleFileIO, place: Place, names: list[str]) -> None:
        self.place = place
        self._storage = storage
        self._names = frozenset(names)
        rows = self._read("__properties_version1.0") if "__properties_version1.0" in self._names else b""
        # The header of the outermost message is longer than that of an enclosed one.
        rows = rows[24 if place else 32 :]
        self.numbers: dict[int, int] = {
            tag: value for tag, _, value in struct.iter_unpack("<IIQ", rows[: len(rows) // 16 * 16])
        }
        """Tag with type → the value of a property of fixed length."""

    def has(self, tag: str) -> bool:
        return f"__substg1.0_{tag}" in self._names

    def content(self, tag: str, most: int | None = None) -> bytes:
        """Up to `most` bytes of the property, whose tag includes its type."""
        return self._read(f"__substg1.0_{tag}", most)

    def text(self, tag: str, most: int | None = None) -> str:
        """The property of this tag without type; empty if there is none. Raises UnknownEncoding."""
        if self.has(f"{tag}001F"):
            text = self.content(f"{tag}001F", most).decode("utf-16-le", errors="replace")
        elif self.has(f"{tag}001E"):
            page = self.numbers.get(_CODE_PAGE)
            text = decode(self.content(f"{tag}001E", most), f"cp{page}" if page else None)[0]
        else:
            text = ""
        return text.rstrip("\0")

    def line(self, tag: str) -> str:
        """The property as one line. It is empty if its encoding is not known: the rest of the e-mail is read."""
        try:
            return " ".join(self.text(tag, MAX_HEADER).split())
        except UnknownEncoding:
            return ""

    def _read(self, name: str, most: int | None = None) -> bytes:
        with self._storage.openstream([*self.place, name]) as stream:
            return bytes(stream.read(-1 if most is None else most))


def _own_blocks(message: _Storage, warnings: list[str]) -> Iterator[Block]:
    subject = message.line(_SUBJECT) or None
    head = _head(message)
    text = message.text(_BODY).strip()
    try:
        page = _page(message).strip()
    except UnknownEncoding:
        if not text:
            raise
        page = ""
    if text and len(page) <= LONGER * len(text):
        yield Block(head + text, subject)
    elif page:
        for block in sections(head + page):
            yield block._replace(section=" > ".join(filter(None, (subject, block.section))) or None)
    elif message.has(_RTF):
        warnings.append("The text of an e-mail is in RTF, which is not read. Save the e-mail as plain text or HTML.")


def _page(message: _Storage) -> str:
    if message.has(_HTML_BYTES):
        return html_markdown(message.content(_HTML_BYTES))[0]
    return markdown(message.text(_HTML_BYTES[:4]))


def _head(message: _Storage) -> str:
    sender, address = message.line(_SENDER), message.line(_SENDER_ADDRESS)
    fields = {
        "From": f"{sender} <{address}>" if address and address != sender else sender,
        "To": message.line(_TO),
        "Cc": message.line(_CC),
        "Date": "",
    }
    if sent := message.numbers.get(_SENT):
        # A FILETIME counts tenths of microseconds.
        fields["Date"] = format_datetime(_YEAR_1601 + timedelta(microseconds=sent // 10))
    return "".join(f"{name}: {value}\n" for name, value in fields.items() if value) + "\n"
