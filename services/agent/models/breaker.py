"""A circuit breaker: an endpoint that fails repeatedly is not called for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import timedelta

from infra.recent import Recent
from services.agent.models.contract import Model, ModelAnswer, ModelFailed, OnText, Prompt

# This many failures in a row open the circuit for this long. Then one call is let through as a trial.
FAILURES = 5
OPEN_SECONDS = 15.0
ENDPOINTS = 4_096


@dataclass(frozen=True)
class Circuit:
    """The state of one endpoint. It is pure; the caller passes the time in seconds."""

    failures: int = 0
    open_until: float = 0.0

    def wait(self, now: float) -> float:
        """The number of seconds until a call is allowed; 0: it is allowed now."""
        return max(0.0, self.open_until - now)

    def tried(self, now: float) -> Circuit:
        """A call begins. If the circuit was open, it stays open for other calls until this one ends."""
        return replace(self, open_until=now + OPEN_SECONDS) if self.failures >= FAILURES else self

    def ended(self, now: float, *, well: bool) -> Circuit:
        failures = 0 if well else self.failures + 1
        return Circuit(failures, now + OPEN_SECONDS if failures >= FAILURES else 0.0)


class Breaker:
    """The circuits of this process, by endpoint."""

    def __init__(self) -> None:
        self._circuits: Recent[object, Circuit] = Recent(ENDPOINTS)

    def guard(self, endpoint: object, model: Model) -> Model:
        """`model`, asked only while the circuit of its endpoint is closed."""
        return _Guarded(self, endpoint, model)

    async def answer(self, endpoint: object, model: Model, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        circuit = self._circuits.get(endpoint, Circuit())
        if wait := circuit.wait(time.monotonic()):
            reason = "the provider failed repeatedly; calls to it are suspended for a while"
            raise ModelFailed(reason, transient=True, after=timedelta(seconds=wait))
        trial = circuit.tried(time.monotonic())
        self._circuits[endpoint] = trial
        well: bool | None = None
        try:
            answer = await model.answer(prompt, on_text)
            well = True
            return answer
        except ModelFailed as error:
            # A refused request was understood, and a busy provider names a delay. Neither is a failure of the endpoint.
            well = not error.transient or error.after is not None
            raise
        finally:
            # By the state of now: other calls have ended since this one began.
            current = self._circuits.get(endpoint, Circuit())
            if well is not None:
                self._circuits[endpoint] = current.ended(time.monotonic(), well=well)
            elif current is trial:
                # A call that this side cancelled says nothing about the endpoint. The next call may be the trial.
                self._circuits[endpoint] = circuit


class _Guarded:
    def __init__(self, breaker: Breaker, endpoint: object, model: Model) -> None:
        self._breaker = breaker
        self._endpoint = endpoint
        self._model = model

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        return await self._breaker.answer(self._endpoint, self._model, prompt, on_text)
