"""Reads an e-mail (RFC 5322, MIME): its subject, people, date and text, and the e-mails that it encloses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from email.header import decode_header
from email.message import Message
from email.parser import BytesParser
from email.policy import Compat32
from typing import IO

from infra.stores.charsets import UnknownEncoding, decode
from services.memory import markup
from services.memory.domain import Block, UnreadableFile, sections

MAX_HEADER = 10_000
_SHOWN = ("From", "To", "Cc", "Date")
_ENCRYPTED = frozenset(("multipart/encrypted", "application/pkcs7-mime", "application/x-pkcs7-mime"))

# Why an e-mail was not delivered, and to whom (RFC 3464).
_STATUS = "message/delivery-status"


class _ShortHeaders(Compat32):
    """Cuts long headers: the library's time grows with the square of their length."""

    def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
        name, value = super().header_source_parse(sourcelines)
        return name, value[:MAX_HEADER]


def blocks(file: IO[bytes], warnings: list[str]) -> Iterator[Block]:
    """The e-mail under its subject, then the enclosed ones. Adds the attachments, which are not read, to `warnings`.
    Raises UnreadableFile, UnknownEncoding."""
    attached: list[str] = []
    waiting = [BytesParser(policy=_ShortHeaders()).parse(file)]
    while waiting:
        mail = waiting.pop()
        subject = _header(mail, "Subject") or None
        head = "".join(f"{name}: {value}\n" for name in _SHOWN if (value := _header(mail, name))) + "\n"
        parts, enclosed = _parts(mail)
        waiting += reversed(enclosed)
        for part in parts:
            type_ = part.get_content_type()
            if type_ in _ENCRYPTED:
                raise UnreadableFile("The e-mail is encrypted. Upload it without encryption.")
            is_text = part.get_content_maintype() == "text" or type_ == _STATUS
            if not is_text or part.get_content_disposition() == "attachment":
                attached.append(_decoded_words(part.get_filename() or type_))
            elif type_ == "text/html":
                for block in sections(head + markup.markdown(_text(part))):
                    yield block._replace(section=" > ".join(filter(None, (subject, block.section))) or None)
                head = ""
            elif text := _text(part).strip():
                yield Block(head + text, subject)
                head = ""
    note_attachments(attached, warnings)


def note_attachments(names: Sequence[str], warnings: list[str]) -> None:
    """Adds the names of the attachments, which are not read, to `warnings`."""
    if names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        warnings.append(f"Attachments are not read: {shown}. Upload them as documents.")


def _parts(mail: Message) -> tuple[list[Message], list[Message]]:
    """The parts of an e-mail that have content, and the e-mails that it encloses. Of the alternatives of one text
    the plain one is read."""
    parts: list[Message] = []
    enclosed: list[Message] = []
    waiting = [mail]
    while waiting:
        part = waiting.pop()
        type_ = part.get_content_type()
        if type_ in _ENCRYPTED or type_ == _STATUS or not part.is_multipart():
            parts.append(part)
            continue
        inner = [each for each in part.get_payload() if isinstance(each, Message)]
        if type_ == "message/rfc822":
            enclosed += inner
            continue
        if type_ == "multipart/alternative":
            plain = [each for each in inner if each.get_content_type() == "text/plain" and _text(each).strip()]
            inner = plain[:1] or inner[-1:]
        waiting += reversed(inner)
    return parts, enclosed


def _text(part: Message) -> str:
    if part.get_content_type() == _STATUS:
        # The library reads its groups of lines as the headers of e-mails.
        groups = [group for group in part.get_payload() if isinstance(group, Message)]
        return "\n".join(f"{name}: {value}" for group in groups for name, value in group.items())
    content = part.get_payload(decode=True)
    return decode(content, part.get_content_charset())[0] if isinstance(content, bytes) else ""


def _header(mail: Message, name: str) -> str:
    value = mail.get(name)
    return "" if value is None else _decoded_words(value)


def _decoded_words(value: object) -> str:
    """A header's value with its encoded words (RFC 2047) decoded, on one line."""
    text = ""
    for part, charset in decode_header(value):  # type: ignore[arg-type]  # it also takes the Header of raw bytes
        try:
            text += part if isinstance(part, str) else decode(part, charset)[0]
        except UnknownEncoding:
            text += part.decode("ascii", errors="replace")
    return " ".join(text.split())
