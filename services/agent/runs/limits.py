"""The limits of a run, and whether they allow its next step. Pure."""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from services.agent.runs.domain import Run


class Limits(msgspec.Struct, frozen=True):
    """The limits of one run."""

    steps: int = 20
    seconds: int = 300
    """Counted from the first start, without the time in which the run waited for a decision."""
    tokens: int | None = None
    """Input and output of all model calls."""
    nanos: int | None = None
    """The most that the model calls may cost."""


def exceeded(run: Run, limits: Limits, step: int, now: datetime) -> str | None:
    """The limit that forbids the step; None if the step may be made."""
    if step > limits.steps:
        return f"the limit of {limits.steps} steps is reached"
    if limits.tokens is not None and run.tokens >= limits.tokens:
        return f"the limit of {limits.tokens} tokens is reached"
    if remaining(run, limits, now) <= 0:
        return f"the limit of {limits.seconds} seconds is reached"
    return None


def remaining(run: Run, limits: Limits, now: datetime) -> float:
    """Seconds until the run's time limit."""
    assert run.started_at is not None
    return (run.started_at + timedelta(seconds=limits.seconds) - now).total_seconds()
