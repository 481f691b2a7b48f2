"""An endpoint that fails repeatedly is not called for a while."""

from __future__ import annotations

import asyncio

import pytest

from services.agent.models import breaker as module
from services.agent.models.breaker import FAILURES, OPEN_SECONDS, Breaker, Circuit
from services.agent.models.contract import ModelAnswer, ModelFailed, OnText, Prompt, Usage, UserTurn

PROMPT = Prompt("", (UserTurn("hi"),))
WELL = ModelAnswer("hi", (), Usage(), "m", "stop")


def failing(times: int, now: float = 0.0) -> Circuit:
    circuit = Circuit()
    for _ in range(times):
        circuit = circuit.ended(now, well=False)
    return circuit


def test_a_circuit_opens_after_failures_in_a_row_and_closes_after_one_success() -> None:
    assert failing(FAILURES - 1).wait(0) == 0
    assert failing(FAILURES - 1).ended(0, well=True) == Circuit()
    open_ = failing(FAILURES)
    assert (open_.wait(0), open_.wait(OPEN_SECONDS)) == (OPEN_SECONDS, 0)


def test_after_a_while_one_trial_call_goes_out() -> None:
    trying = failing(FAILURES).tried(OPEN_SECONDS)
    assert trying.wait(OPEN_SECONDS) == OPEN_SECONDS
    assert trying.ended(OPEN_SECONDS + 1, well=False).wait(OPEN_SECONDS + 1) == OPEN_SECONDS
    assert trying.ended(OPEN_SECONDS + 1, well=True).wait(OPEN_SECONDS + 1) == 0


class Provider:
    """Fails as it is told to."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.asked = 0

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        return WELL


async def nobody(text: str) -> None:
    raise AssertionError(text)


async def test_an_open_circuit_calls_no_provider_and_belongs_to_one_endpoint() -> None:
    breaker, provider = Breaker(), Provider()
    one, other = breaker.guard("one", provider), breaker.guard("other", provider)
    provider.errors = [ModelFailed("HTTP 500", transient=True) for _ in range(FAILURES)]
    for _ in range(FAILURES):
        with pytest.raises(ModelFailed, match="HTTP 500"):
            await one.answer(PROMPT, nobody)
    with pytest.raises(ModelFailed, match="calls to it are suspended") as refused:
        await one.answer(PROMPT, nobody)
    assert refused.value.transient
    assert refused.value.after
    assert provider.asked == FAILURES
    assert await other.answer(PROMPT, nobody) == WELL


@pytest.mark.parametrize(
    "error", [ModelFailed("HTTP 400", transient=False), KeyboardInterrupt(), ModelFailed("no answer", transient=True)]
)
async def test_only_failures_of_the_provider_count(error: BaseException) -> None:
    breaker, provider = Breaker(), Provider()
    model = breaker.guard("one", provider)
    for _ in range(2 * FAILURES):
        provider.errors = [error]  # type: ignore[list-item]
        with pytest.raises(type(error)):
            await model.answer(PROMPT, nobody)
    assert provider.asked == (FAILURES if isinstance(error, ModelFailed) and error.transient else 2 * FAILURES)


async def test_the_circuits_of_many_endpoints_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENDPOINTS", 2)
    breaker, provider = Breaker(), Provider()
    for n in range(3):
        await breaker.guard(n, provider).answer(PROMPT, nobody)
    assert len(breaker._circuits) == 2


class Waiting:
    """A provider whose calls wait, and then fail."""

    def __init__(self) -> None:
        self.may_fail = asyncio.Event()

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        await self.may_fail.wait()
        raise ModelFailed("HTTP 500", transient=True)


async def test_calls_at_the_same_time_count_together_and_one_that_is_cancelled_closes_nothing() -> None:
    breaker, provider = Breaker(), Waiting()
    model = breaker.guard("one", provider)
    cancelled = asyncio.create_task(breaker.guard("one", Waiting()).answer(PROMPT, nobody))
    calls = [asyncio.create_task(model.answer(PROMPT, nobody)) for _ in range(FAILURES)]
    await asyncio.sleep(0)
    provider.may_fail.set()
    await asyncio.gather(*calls, return_exceptions=True)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    with pytest.raises(ModelFailed, match="calls to it are suspended"):
        await model.answer(PROMPT, nobody)
