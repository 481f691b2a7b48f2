"""Reads an e-mail (RFC 5322, MIME): its subject, people, date and text, and the e-mails that it encloses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from email.header import decode_header
from email.message import Message
from email.parser import BytesParser
from email.policy import Compat32
from typing import IO

from infra.stores.charsets import UnknownEncoding, decode
from services.memory.domain import DAMAGED, Block, UnreadableFile, sections
from services.memory.files import markup

MAX_HEADER = 10_000
_SHOWN = ("From", "To", "Cc", "Date")
_ENCRYPTED = frozenset(("multipart/encrypted", "application/pkcs7-mime", "application/x-pkcs7-mime"))

# Why an e-mail was not delivered, and to whom (RFC 3464).
_STATUS = "message/delivery-status"
_READ = frozenset(("text/plain", "text/html", "text/csv", "text/markdown", _STATUS))
# How often longer a page is than the plain text that only says that the program cannot show the page.
LONGER = 3


class _ShortHeaders(Compat32):
    """Cuts long headers: the library's time grows with the square of their length."""

    def header_source_parse(self, sourcelines: list[str]) -> tuple[str, str]:
        name, value = super().header_source_parse(sourcelines)
        return name, value[:MAX_HEADER]


def blocks(file: IO[bytes], warnings: list[str]) -> Iterator[Block]:
    """The e-mail under its subject, then the enclosed ones. Adds the attachments, which are not read, to `warnings`.
    Raises UnreadableFile, UnknownEncoding."""
    attached: list[str] = []
    is_damaged = False
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
            if type_ not in _READ or part.get_content_disposition() == "attachment":
                attached.append(_decoded_words(part.get_filename() or type_))
                continue
            text = _text(part).strip()
            is_damaged = is_damaged or "\ufffd" in text
            if type_ == "text/html":
                for block in sections(head + markup.markdown(text)):
                    yield block._replace(section=" > ".join(filter(None, (subject, block.section))) or None)
                head = ""
            elif text:
                yield Block(head + text, subject)
                head = ""
        if subject and head.strip():
            # All that it says stands in its subject, or in its attachments.
            yield Block(head, subject)
    if is_damaged:
        warnings.append(DAMAGED)
    note_attachments(attached, warnings)


def note_attachments(names: Sequence[str], warnings: list[str]) -> None:
    """Adds the names of the attachments, which are not read, to `warnings`."""
    if names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        warnings.append(f"Attachments are not read: {shown}. Upload them as documents.")


def _parts(mail: Message) -> tuple[list[Message], list[Message]]:
    """The parts of an e-mail that have content, and the e-mails that it encloses. Of the alternatives of one text
    one is read, and the attachments of all of them count."""
    parts: list[Message] = []
    enclosed: list[Message] = []
    # With each part, whether its text is read.
    waiting = [(mail, True)]
    while waiting:
        part, is_read = waiting.pop()
        type_ = part.get_content_type()
        if type_ in _ENCRYPTED or type_ == _STATUS or not part.is_multipart():
            is_other = part.get_content_maintype() != "text" or part.get_filename() is not None
            if is_read or is_other or part.get_content_disposition() == "attachment":
                parts.append(part)
            continue
        inner = [each for each in part.get_payload() if isinstance(each, Message)]
        if type_ == "message/rfc822":
            enclosed += inner
            continue
        chosen = _chosen(inner) if type_ == "multipart/alternative" else None
        waiting += reversed([(each, is_read and chosen in (None, each)) for each in inner])
    return parts, enclosed


def _chosen(alternatives: list[Message]) -> Message | None:
    """The alternative that is read: the plain text, unless the page says much more."""
    texts = []
    for each in alternatives:
        root = each
        # A page stands before its pictures and attachments.
        while root.get_content_type() in ("multipart/related", "multipart/mixed"):
            root = next((part for part in root.get_payload() if isinstance(part, Message)), Message())
        if (type_ := root.get_content_type()) in ("text/plain", "text/html") and (length := _length(root)):
            texts.append((type_, length, each))
    plain = next(((length, each) for type_, length, each in texts if type_ == "text/plain"), None)
    page = next(((length, each) for type_, length, each in reversed(texts) if type_ == "text/html"), None)
    if plain and not (page and page[0] > LONGER * plain[0]):
        return plain[1]
    return page[1] if page else alternatives[-1] if alternatives else None


def _length(part: Message) -> int:
    try:
        text = _text(part)
    except UnknownEncoding:
        return 0
    return len((markup.markdown(text) if part.get_content_type() == "text/html" else text).strip())


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
