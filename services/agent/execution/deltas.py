"""Live text of an answer while the model writes it. It is not stored: the run's last event has the whole reply."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.stores.cache import Cache
from protos.pubsub import RUN_DELTAS


def channel(run_id: UUID) -> str:
    return f"{RUN_DELTAS}{run_id}"


class Deltas:
    """Publishes pieces of one attempt of a step as ``{"step", "attempt", "n", "text"}``; `n` counts them from 1."""

    def __init__(self, cache: Cache, run_id: UUID, step: int, attempt: int) -> None:
        self._cache = cache
        self._channel = channel(run_id)
        self._step = step
        self._attempt = attempt
        self._n = 0

    def __call__(self, text: str) -> None:
        self._n += 1
        piece = {"step": self._step, "attempt": self._attempt, "n": self._n, "text": text}
        self._cache.publish_soon(self._channel, msgspec.json.encode(piece))
