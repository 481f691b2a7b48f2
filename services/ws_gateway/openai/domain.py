"""The text of a run for a stream that cannot take text back. Pure."""

from __future__ import annotations

from typing import NamedTuple

from services.ws_gateway.domain import Delta


class Piece(NamedTuple):
    """Text to send. The text of a step follows the text of the step before."""

    step: int
    text: str


class TakenBack(Exception):
    """The answer no longer contains text that was sent."""


class Transcript:
    """The text of one run that was sent. If a piece of a step is missing, its later pieces are not sent: the rest comes
    with the reply."""

    def __init__(self) -> None:
        self._at = (0, 0)  # step and attempt of the text that was sent last
        self._n = 0
        self._text = ""
        self._last_step = 0  # the last model step

    def began(self, step: int, kind: str, attempt: int) -> None:
        """Records the start of a step. Raises TakenBack if the step is repeated and some of its text was sent."""
        self._check(step, attempt)
        if kind == "model":
            self._last_step = step

    def delta(self, delta: Delta) -> Piece | None:
        """The piece, if it continues the sent text. Raises TakenBack like `began`."""
        self._check(delta.step, delta.attempt)
        at = delta.step, delta.attempt
        if at > self._at and delta.n == 1:
            self._at, self._n, self._text = at, 0, ""
        if at != self._at or delta.n != self._n + 1:
            return None
        self._n = delta.n
        self._text += delta.text
        return Piece(delta.step, delta.text)

    def reply(self, text: str) -> Piece:
        """The part of the reply that was not sent yet. The reply is the text of the last model step. Raises
        TakenBack."""
        if self._at[0] != self._last_step:
            return Piece(self._last_step, text)
        if not text.startswith(self._text):
            raise TakenBack
        return Piece(self._last_step, text.removeprefix(self._text))

    def _check(self, step: int, attempt: int) -> None:
        if step == self._at[0] and attempt > self._at[1] and self._text:
            raise TakenBack
