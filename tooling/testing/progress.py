"""Progress of a long test on the terminal."""

from __future__ import annotations

import sys
import time

import pytest


class Progress:
    """Lines on the terminal, past pytest's capture: a large campaign takes most of an hour."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._started = time.monotonic()

    def show(self, what: str, done: int, of: int) -> None:
        self.say(f"{done} of {of} {what}")

    def say(self, text: str) -> None:
        with self._capture.disabled():
            sys.stderr.write(f"{time.monotonic() - self._started:.0f} s: {text}\n")
