"""Builds the executor of a process."""

from __future__ import annotations

from functools import cache

from infra.service.service import Runtime
from infra.stores.cache import Cache
from services.agent import adapters
from services.agent.execution.context import Services
from services.agent.execution.executor import Executor
from services.agent.execution.group_write import GroupWriter
from services.agent.execution.watch import Watch
from services.agent.models.library import Models


def services(runtime: Runtime) -> Services:
    return Services(
        adapters.memory(runtime),
        adapters.billing(runtime),
        adapters.plugin(runtime),
        Cache(runtime.cache),
        adapters.objects(runtime),
    )


@cache
def models(runtime: Runtime) -> Models:
    """One of a process: a circuit that one caller has opened is open for the others."""
    return Models(runtime.outgoing.transport())


def executor(runtime: Runtime) -> Executor:
    return executor_with(runtime, models(runtime), services(runtime))


def executor_with(runtime: Runtime, models: Models, called: Services) -> Executor:
    """As `executor`, with other models and services."""
    worker = runtime.worker
    return Executor(worker, models, called, GroupWriter(worker), Watch(worker), runtime.cipher)
