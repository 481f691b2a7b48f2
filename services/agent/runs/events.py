"""The journal of a run, one stream each. `n` counts its facts from 1 without a gap; what a person or a model said is
sealed under the key of the run's subject.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

StepKind = Literal["retrieve", "model", "tool"]
Ending = Literal["failed", "cancelled", "refused", "indeterminate"]


class RunStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A worker has begun, or goes on with, the run. The agent's version is that of the first start."""

    n: int
    session_key: str
    agent_id: UUID
    agent_version: int
    attempt: int
    at: datetime


class StepStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A step is begun, or begun again with a higher `attempt`."""

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    attempt: int


class StepCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """A step has ended for good; it is never made again.

    content: what came out, sealed; None where it failed. error: for the operator. tokens: used, as reported.
    """

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    status: Literal["completed", "failed"]
    attempts: int
    duration_ms: int
    content: bytes | None
    error: str | None = None
    tokens: int = 0


class RunCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """The run has answered. `reply` is sealed."""

    n: int
    session_key: str
    reply: bytes


class RunFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The run has ended without an answer. `error`: for the operator, nothing that a person wrote."""

    n: int
    session_key: str
    status: Ending
    error: str


Event = RunStarted | StepStarted | StepCompleted | RunCompleted | RunFailed
