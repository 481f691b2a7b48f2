"""Tools, their calls, and the decision on a call that is in the ledger already. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

Effect = Literal["repeatable", "keyed", "once"]
"""repeatable: the tool only reads. keyed: its server drops repeats by our key. once: it must not run twice."""

TOOL_NAME = re.compile(r"[a-z0-9_]{1,64}")
# Size of a result as JSON.
MAX_RESULT_BYTES = 256 * 1024


class Tool(msgspec.Struct, frozen=True):
    """The description of a tool for a model."""

    name: str
    description: str
    schema: Mapping[str, Any]
    """JSON Schema of the arguments, an object."""
    effect: Effect


class Call(NamedTuple):
    """One call of a tool."""

    tenant_id: str
    tool: str
    arguments: dict[str, Any]
    key: str
    """The idempotency key: the same for every repeat of the call."""
    seconds: float
    """The time that the call may take."""


class Outcome(msgspec.Struct, frozen=True):
    """The end of a call."""

    state: Literal["succeeded", "failed", "unknown"]
    result: str = ""
    """JSON. Empty unless the call succeeded."""
    error: str = ""
    """The reason, for the model and the operator."""


class LedgerEntry(NamedTuple):
    """A call as the ledger holds it."""

    state: Literal["started", "succeeded", "failed", "unknown"]
    attempt: int
    abandoned: bool
    """The lease has expired: the process that ran the call has stopped renewing it."""


Action = Literal["run", "wait", "answer", "give up"]


def next_action(recorded: LedgerEntry | None, effect: Effect) -> Action:
    """Decides on a call: run it (again), wait for the process that runs it, answer with the recorded outcome, or
    record that the outcome cannot be known."""
    if recorded is None:
        return "run"
    if recorded.state != "started":
        return "answer"
    if not recorded.abandoned:
        return "wait"
    return "give up" if effect == "once" else "run"


def without_answer(effect: Effect, reason: str) -> Outcome:
    """Returns the outcome of a call that was sent and not answered in time."""
    if effect == "repeatable":
        return Outcome("failed", error=reason)
    return Outcome("unknown", error=f"{reason}; the call may have taken effect")


def plain_name(name: str) -> str:
    """Converts the name of an MCP tool to a valid tool name: ``Get-Weather`` becomes ``get_weather``."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:64]
