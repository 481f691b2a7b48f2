"""Data URLs (RFC 2397) in texts, also as the target of a link or an image in Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable

# The label is bounded, so that a text full of brackets takes linear time.
_DATA_URL = re.compile(
    r"(?:!?\[([^\[\]\n]{0,200})\]\(<?)?data:([a-z]+/[a-z0-9.+-]{1,100})(?:;[a-z-]+=[\w.-]+)?;base64,([A-Za-z0-9+/]+={0,2})(?:>?\))?"
)


def replaced(text: str, take: Callable[[str, str, str], str]) -> str:
    """`text` with the result of `take` in place of each data URL in base64, with its link if it has one.

    `take` gets the label of the link (empty if there is none), the MIME type, and the content in base64.
    """
    if ";base64," not in text:
        return text
    return _DATA_URL.sub(lambda found: take((found[1] or "").strip(), found[2], found[3]), text)


def named(text: str) -> str:
    """`text` with the label, or the MIME type, in place of each data URL: for models a picture is a long number."""
    return replaced(text, lambda label, mime_type, _: f"[{label or mime_type}]")
