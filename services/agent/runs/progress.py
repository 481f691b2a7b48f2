"""Tells the channel service that a run is at work, with the text that its model has written so far. It is not stored:
the delivery of the reply has the whole text."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import msgspec

from infra.stores.cache import Cache
from protos.pubsub import RUN_PROGRESS

# A run that ends earlier tells nothing: its reply comes soon enough, and most runs cost nothing here.
FIRST_SECONDS = 2.0
# A text that has grown is told this often; that the run is still at work, less often.
TEXT_SECONDS = 1.0
WORK_SECONDS = 4.0
# No vendor shows more in one message.
MAX_CHARACTERS = 30_000


class ProgressReporter:
    """The progress of one run that came from a channel. `text`: the answer so far, by the model of the present step."""

    def __init__(self, cache: Cache, run_id: UUID, session_key: str) -> None:
        self._cache = cache
        self._run_id = run_id
        self._session_key = session_key
        self._told = ""
        self._told_at = 0.0
        self._telling: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.text = ""

    def write(self, text: str) -> None:
        # The whole of a long answer would be copied for each of its pieces.
        if len(self.text) < MAX_CHARACTERS:
            self.text += text

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tells the progress during the block."""
        self._timer = asyncio.get_running_loop().call_later(FIRST_SECONDS, self._tick)
        try:
            yield
        finally:
            self._timer.cancel()

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TEXT_SECONDS, self._tick)
        now, text = asyncio.get_running_loop().time(), self.text[:MAX_CHARACTERS]
        if text == self._told and now - self._told_at < WORK_SECONDS:
            return
        self._told, self._told_at = text, now
        self._tell(text)

    def _tell(self, text: str) -> None:
        self._telling = asyncio.create_task(_publish(self._cache, self._run_id, self._session_key, text, over=False))


async def tell_end(cache: Cache, run_id: UUID, session_key: str) -> None:
    """The run has ended, and sends nothing: the part of its answer that the person was shown, perhaps by another
    process, is taken back."""
    await _publish(cache, run_id, session_key, "", over=True)


async def _publish(cache: Cache, run_id: UUID, session_key: str, text: str, *, over: bool) -> None:
    news = {"run_id": run_id, "session_key": session_key, "text": text, "over": over}
    await cache.publish(RUN_PROGRESS, msgspec.json.encode(news))
