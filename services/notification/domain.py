"""Checks of an e-mail's fields, and the result of sending it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

# An e-mail that could not be sent for this long is of no use any more.
LIFE = timedelta(days=1)
LATE = "could not be sent within a day"
MAX_SUBJECT = 500

# One address of RFC 5321, without quoted local parts and literal domains. A domain needs no dot: hosts in a company's
# own network have plain names. No character of an address can end a header or begin another recipient; an encoded
# word (RFC 2047), which begins with =?, could hold such a character.
_CHARACTER = r"[^\s@<>()\[\]\\,;:\"\x00-\x1f\x7f]"
_ADDRESS = re.compile(rf"(?!.*=\?){_CHARACTER}{{1,64}}@(?![-.])(?!.*(?:\.\.|\.$)){_CHARACTER}{{1,255}}")
# An enhanced status code (RFC 3463) at the beginning of a server's answer.
_STATUS = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")


class SendResult(NamedTuple):
    """The end of a notification."""

    state: Literal["sent", "failed"]
    reason: str
    """The errors; empty if there were none."""


def is_address(text: str) -> bool:
    return _ADDRESS.fullmatch(text) is not None


def is_one_line(text: str) -> bool:
    """True if `text` can be the value of a header: a line break in it would begin another header."""
    return len(text.splitlines()) <= 1 and not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text)


def is_file(name: str, media_type: str) -> bool:
    """True if both can be values of an attachment's headers."""
    return bool(re.fullmatch(r"[\w. -]{1,100}", name) and re.fullmatch(r"[a-z]+/[a-z0-9.+-]{1,100}", media_type))


def masked(address: str) -> str:
    """``o***@example.com``: enough to recognise a known address."""
    name, _, domain = address.rpartition("@")
    return f"{name[:1]}***@{domain}"


def refusal_text(code: int, answer: str) -> str:
    """A mail server's refusal, with its codes only: its words often repeat the address."""
    status = _STATUS.match(answer)
    return f"refused by the mail server: {code} {status[0]}" if status else f"refused by the mail server: {code}"


def result_of_all(errors: Sequence[str | None]) -> SendResult:
    """The result of an e-mail from the errors of its recipients; None means that the recipient got it."""
    if not errors:
        return SendResult("failed", "the tenant has no owner with an address")
    refused = [error for error in errors if error is not None]
    reasons = "; ".join(sorted(set(refused)))
    if len(refused) == len(errors):
        return SendResult("failed", reasons)
    return SendResult("sent", f"{len(refused)} of {len(errors)} recipients: {reasons}" if refused else "")
