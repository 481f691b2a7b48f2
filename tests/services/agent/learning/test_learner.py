"""The call of the model that no run's limit of time ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from services.agent.learning import learner
from services.agent.models.contract import ModelFailed


class _Drips:
    async def answer(self, _: Any, on_text: Any) -> Any:
        while True:
            await asyncio.sleep(0.01)
            await on_text("x")


async def test_an_answer_that_drips_ends_by_the_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "ANSWER_SECONDS", 0.1)
    unused: Any = None
    call = learner._Call(unused, unused, "learning/openai/slow", _Drips(), unused, unused, unused)
    heard: list[str] = []

    async def hear(text: str) -> None:
        heard.append(text)

    async with asyncio.timeout(5):
        with pytest.raises(ModelFailed, match=r"did not end within 0\.1 seconds") as failed:
            await call._answered(hear)
    assert heard
    assert not failed.value.transient
