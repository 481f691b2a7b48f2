"""Builds the learner of a process."""

from __future__ import annotations

from infra.service.service import Runtime
from services.agent.execution.wiring import models, services
from services.agent.learning.learner import Learner


def learner(runtime: Runtime) -> Learner:
    return Learner(runtime.worker, models(runtime), services(runtime), runtime.cipher)
