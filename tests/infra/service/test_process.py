"""The process of a service."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from infra.service import process
from infra.service.process import collect_by_bytes


class Kept:
    """A body in a cycle, as libraries leave the requests that they refuse."""

    def __init__(self) -> None:
        self.body = b"x" * 2**20
        self.itself = self


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_garbage_is_collected_by_its_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LOOK_SECONDS", 0.01)
    collect_by_bytes(asyncio.get_running_loop())
    bodies: weakref.WeakSet[Kept] = weakref.WeakSet()
    for made in range(25, 1_000, 25):
        for _ in range(25):
            bodies.add(Kept())
        await asyncio.sleep(0.02)
        if len(bodies) < made:
            return
    raise AssertionError(f"{len(bodies)} MB of garbage")
