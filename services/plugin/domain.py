"""Tools, their calls, and the decision on a call that is in the ledger already. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec

Effect = Literal["repeatable", "keyed", "once"]
"""repeatable: it only reads, or a repeat changes nothing more. keyed: its server drops repeats by our key. once: it
must not run twice."""

TOOL_NAME = re.compile(r"[a-z0-9_]{1,64}")
# Size of a result as JSON, without its files.
MAX_RESULT_BYTES = 256 * 1024
MAX_FILES = 4
MAX_FILES_BYTES = 3 * 1024 * 1024
"""Of the files of one result together. gRPC takes messages of 4 MiB."""


class Tool(msgspec.Struct, frozen=True):
    """The description of a tool for a model."""

    name: str
    description: str
    schema: Mapping[str, Any]
    """JSON Schema of the arguments, an object."""
    effect: Effect


class McpTool(NamedTuple):
    """A tool as an MCP server describes it, not checked yet."""

    name: str
    description: str
    schema: Any
    repeatable: bool
    """The server says that the tool only reads or may be called again."""


class ToolRequest(NamedTuple):
    """One call of a tool."""

    tenant_id: str
    tool: str
    arguments: dict[str, Any]
    key: str
    """The idempotency key: the same for every repeat of the call."""
    seconds: float
    """The time that the call may take."""
    agent_id: str = ""
    """The agent that calls."""
    subject_id: str = ""
    """The person with whom the outcome is erased; empty if the caller names none."""
    speaker_id: str = ""
    """The person who speaks in the run alone; empty if there are several, or none."""
    hold_id: UUID | None = None
    """Of billing; the usage record closes it."""
    channel_id: UUID | None = None
    session_key: str = ""
    api_key_id: str = ""
    member_id: UUID | None = None
    run_id: UUID | None = None
    tag: str = ""


class ToolFile(msgspec.Struct, frozen=True):
    """A file that a tool returned."""

    name: str
    content: bytes


class ToolOutput(NamedTuple):
    """The result of a tool."""

    value: Any
    """JSON. It names the files."""
    files: tuple[ToolFile, ...] = ()


class CallOutcome(msgspec.Struct, frozen=True):
    """The end of a call."""

    state: Literal["succeeded", "failed", "unknown"]
    result: str = ""
    """JSON. Empty unless the call succeeded."""
    error: str = ""
    """The reason, for the model and the operator."""
    files: tuple[ToolFile, ...] = ()


class RecordedCall(NamedTuple):
    """A call as the ledger holds it."""

    state: Literal["started", "succeeded", "failed", "unknown"]
    attempt: int
    abandoned: bool
    """The lease has expired: the process that ran the call has stopped renewing it."""


Action = Literal["run", "wait", "answer", "give up"]


def next_action(recorded: RecordedCall | None, effect: Effect) -> Action:
    """Decides on a call: run it (again), wait for the process that runs it, answer with the recorded outcome, or
    record that the outcome cannot be known."""
    if recorded is None:
        return "run"
    if recorded.state != "started":
        return "answer"
    if not recorded.abandoned:
        return "wait"
    return "give up" if effect == "once" else "run"


def without_answer(effect: Effect, reason: str) -> CallOutcome:
    """Returns the outcome of a call that was sent and not answered in time."""
    if effect == "repeatable":
        return CallOutcome("failed", error=reason)
    return CallOutcome("unknown", error=f"{reason}; the call may have taken effect")


# A run of so many characters, as in a picture or a data URL: no word of a text is as long. Or many full lines of MIME's
# base64. Both search in linear time: a match can begin only at the start of a run or of a line.
_BASE64 = re.compile(
    r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{1000,}={0,2}"
    r"|^(?:[A-Za-z0-9+/]{60,76}\r?\n){12,}(?:[A-Za-z0-9+/]{1,76}={0,2})?",
    re.MULTILINE,
)


def without_base64(value: Any) -> Any:
    """Replaces long base64 texts in a JSON value with a note, because they would fill the model's window."""
    match value:
        case str():
            return _BASE64.sub(lambda found: f"[base64 data left out: {len(found[0])} characters]", value)
        case dict():
            return {key: without_base64(part) for key, part in value.items()}
        case list():
            return [without_base64(part) for part in value]
        case _:
            return value


def plain_name(name: str) -> str:
    """Converts the name of an MCP tool to a valid tool name: ``Get-Weather`` becomes ``get_weather``."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())[:64]
