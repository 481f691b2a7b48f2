"""A tool, a call of it, and what is to be done with a call that was seen before. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

# repeatable: it only reads. keyed: the other side drops repeats by our key. once: it must not be run twice.
Effect = Literal["repeatable", "keyed", "once"]

TOOL_NAME = re.compile(r"[a-z0-9_]{1,64}")
# Of a result, as JSON.
MAX_RESULT_BYTES = 256 * 1024


class Tool(msgspec.Struct, frozen=True):
    """What a model is told of a tool. `schema`: JSON Schema of the arguments, an object."""

    name: str
    description: str
    schema: Mapping[str, Any]
    effect: Effect


class Call(NamedTuple):
    """One use of a tool. `key`: the same for the same call, however often it is asked. `seconds`: it may take."""

    tenant_id: str
    tool: str
    arguments: dict[str, Any]
    key: str
    seconds: float


class Outcome(msgspec.Struct, frozen=True):
    """How a call has ended. `result`: JSON, empty unless it succeeded. `error`: for model and operator."""

    state: Literal["succeeded", "failed", "unknown"]
    result: str = ""
    error: str = ""


class Recorded(NamedTuple):
    """What the ledger says of a call. `abandoned`: whoever ran it last has stopped renewing its lease."""

    state: Literal["started", "succeeded", "failed", "unknown"]
    attempt: int
    abandoned: bool


Step = Literal["run", "wait", "answer", "give up"]


def next_step(recorded: Recorded | None, effect: Effect) -> Step:
    """What to do about a call: run it (again), wait for whoever runs it, answer what is recorded, or record that
    nobody can know what came of it."""
    if recorded is None:
        return "run"
    if recorded.state != "started":
        return "answer"
    if not recorded.abandoned:
        return "wait"
    return "give up" if effect == "once" else "run"


def without_answer(effect: Effect, reason: str) -> Outcome:
    """The outcome of a call that was sent and not answered in its time."""
    if effect == "repeatable":
        return Outcome("failed", error=reason)
    return Outcome("unknown", error=f"{reason}; it may have happened all the same")


def plain_name(name: str) -> str:
    """The nearest name that a tool may have: MCP servers allow more (``Get-Weather`` becomes ``get_weather``)."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:64]
