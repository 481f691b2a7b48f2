"""What an e-mail must be like, and what may be told of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

# After so long it is no longer news.
LIFE = timedelta(days=1)
MAX_SUBJECT = 500

# One address as RFC 5321 has it, without quoted local parts and literal domains. A domain needs no dot: in a company's
# own network hosts have plain names. Nothing in it can end a header or begin another recipient.
_ADDRESS = re.compile(r"[^\s@<>()\[\]\\,;:\"\x00-\x1f\x7f]{1,64}@(?!-)[^\s@<>()\[\]\\,;:\"\x00-\x1f\x7f]{1,255}")
# An enhanced status code (RFC 3463) at the beginning of a server's answer.
_STATUS = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")


class Result(NamedTuple):
    """How a notification ended. `reason`: what did not go as it should; empty where all did."""

    state: Literal["sent", "failed"]
    reason: str


def is_address(text: str) -> bool:
    return _ADDRESS.fullmatch(text) is not None


def is_one_line(text: str) -> bool:
    """True where `text` can be the value of a header: a line break in it would begin another header."""
    return len(text.splitlines()) <= 1 and not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text)


def masked(address: str) -> str:
    """``o***@example.com``: enough for somebody who knows the address."""
    name, _, domain = address.rpartition("@")
    return f"{name[:1]}***@{domain}"


def refusal(code: int, answer: str) -> str:
    """A mail server's refusal by its codes alone, for its words tend to repeat the address."""
    status = _STATUS.match(answer)
    return f"refused by the mail server: {code} {status[0]}" if status else f"refused by the mail server: {code}"


def result(errors: Sequence[str | None]) -> Result:
    """How an e-mail ended whose recipients ended with these errors, None being none."""
    if not errors:
        return Result("failed", "the tenant has no owner with an address")
    refused = [error for error in errors if error is not None]
    reasons = "; ".join(sorted(set(refused)))
    if len(refused) == len(errors):
        return Result("failed", reasons)
    return Result("sent", f"{len(refused)} of {len(errors)} recipients: {reasons}" if refused else "")
