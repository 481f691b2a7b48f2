"""Ends a text before the first of the texts that the caller named. Not every server knows the option `stop`, and others
take only few texts.
"""

from __future__ import annotations

from collections.abc import Sequence


def before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of `stops`."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class Stops:
    """The same for a text that comes in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        """The end of the text so far, if one of the stops may begin with it."""
        self._is_over = False

    def feed(self, piece: str) -> str:
        """The part of the text that is known to be before the first stop."""
        if self._is_over:
            return ""
        text = self._held + piece
        if (known := before(text, self._stops)) != text:
            self._is_over = True
            return known
        at = min((_beginning(text, stop) for stop in self._stops), default=len(text))
        self._held = text[at:]
        return text[:at]


def _beginning(text: str, stop: str) -> int:
    """The place in the text from which its end is the beginning of `stop`; the length of the text if there is none."""
    at = text.find(stop[:1], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[:1], at + 1)
    return at if at >= 0 else len(text)
