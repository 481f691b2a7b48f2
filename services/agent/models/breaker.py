"""A circuit breaker: a provider that has failed again and again is left alone for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import timedelta

from services.agent.models.contract import Answer, Model, ModelFailed, OnText, Prompt

# So many failures in a row open it, for so long; then one call is let through to see.
FAILURES = 5
OPEN_SECONDS = 15.0


@dataclass(frozen=True)
class Circuit:
    """The state of one endpoint: pure, by a clock of seconds that the caller has."""

    failures: int = 0
    open_until: float = 0.0

    def wait(self, now: float) -> float:
        """For how many seconds nothing is to be sent; 0: it may be."""
        return max(0.0, self.open_until - now)

    def tried(self, now: float) -> Circuit:
        """A call goes out: while it has not come back, an endpoint that was left alone is so further on."""
        return replace(self, open_until=now + OPEN_SECONDS) if self.failures >= FAILURES else self

    def ended(self, now: float, *, well: bool) -> Circuit:
        failures = 0 if well else self.failures + 1
        return Circuit(failures, now + OPEN_SECONDS if failures >= FAILURES else 0.0)


class Breaker:
    """The circuits of this process, by endpoint."""

    def __init__(self) -> None:
        self._circuits: dict[object, Circuit] = {}

    def guard(self, endpoint: object, model: Model) -> Model:
        """`model`, asked only while the circuit of its endpoint is closed."""
        return _Guarded(self, endpoint, model)

    async def answer(self, endpoint: object, model: Model, prompt: Prompt, on_text: OnText) -> Answer:
        circuit = self._circuits.get(endpoint, Circuit())
        if wait := circuit.wait(time.monotonic()):
            reason = "the provider has failed again and again and is left alone for a while"
            raise ModelFailed(reason, passing=True, after=timedelta(seconds=wait))
        self._circuits[endpoint] = circuit.tried(time.monotonic())
        well: bool | None = None
        try:
            answer = await model.answer(prompt, on_text)
            well = True
            return answer
        except ModelFailed as error:
            # What it refuses it has understood; and one that is only busy says when to come again.
            well = not error.passing or error.after is not None
            raise
        finally:
            # One that was broken off on this side tells nothing.
            self._circuits[endpoint] = circuit if well is None else circuit.ended(time.monotonic(), well=well)


class _Guarded:
    def __init__(self, breaker: Breaker, endpoint: object, model: Model) -> None:
        self._breaker = breaker
        self._endpoint = endpoint
        self._model = model

    async def answer(self, prompt: Prompt, on_text: OnText) -> Answer:
        return await self._breaker.answer(self._endpoint, self._model, prompt, on_text)
