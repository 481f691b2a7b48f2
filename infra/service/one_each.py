"""One piece of costly work for each asker at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from infra.errors import TooManyRequests


class OneEach:
    """Places in this process for work that costs much: a tenant that asks again and again keeps no other waiting."""

    def __init__(self, refusal: str, after: timedelta) -> None:
        """refusal: the words for an asker who has a place already; `after`: when to try again."""
        self._refusal = refusal
        self._after = after
        self._asking: set[str] = set()

    @contextmanager
    def place(self, asker: str) -> Iterator[None]:
        """Holds the asker's place for the length of the block. Raises TooManyRequests while the asker has it."""
        if asker in self._asking:
            raise TooManyRequests(self._after, self._refusal)
        self._asking.add(asker)
        try:
            yield
        finally:
            self._asking.discard(asker)
