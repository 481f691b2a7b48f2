"""The group write: the records of many runs at the same moment are one call of `write_runs` and one commit.

From top to bottom: the write of a single run, the group and its commit, and the columns of the call. The SQL function
`write_runs` (migration 0013) says which rows are locked and which writes are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy.exc import DBAPIError

from infra.errors import Conflict
from infra.failpoint import failpoint
from infra.lanes.claims import LaneHead, Lease
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.postgres.db import CONFLICT, is_transient, sqlstate
from infra.postgres.group_commit import GroupCommit
from infra.postgres.outbox_rows import OutboxRow
from infra.postgres.tx import Tx
from infra.postgres.upcasting import schema_version
from protos.messages.billing import UsageRecorded
from services.agent.models.contract import Usage
from services.agent.runs.events import Event, StepKind

# Half of the runs that a process executes at the same time: while the database commits the writes of one half, the
# process works on the other half. All in one group would wait for the database together, and it for them.
LARGEST_GROUP = 128
# The results of calls are in the writes, so they are tried for as long as this process may still have the lanes. A
# write whose lane went to another process is refused when the database is back.
RETRY_SECONDS = 60.0
RETRY_PAUSES = (0.05, 0.1, 0.2, 0.5)

_log = get_logger("agent.runs")


class RunStopped(Exception):
    """The run is to be cancelled or is over: the step is not begun, the reply is not stored."""


class MessagesArrived(Exception):
    """The run has got more messages: the step is not begun, or the run is not ended, without them."""


# The parts of a write


class Begun(NamedTuple):
    """A step begins."""

    n: int
    kind: StepKind
    name: str
    attempt: int
    span_id: str | None


class EndedStep(NamedTuple):
    """A step ends."""

    n: int
    status: Literal["completed", "failed"]
    duration_ms: int
    error: str | None


class Used(NamedTuple):
    """Usage is recorded. It also goes out as a message."""

    record: UsageRecorded
    usage: Usage


class ReplyMessage(NamedTuple):
    """The reply to the conversation. Its position is drawn in the call, so the body must end with position 0."""

    delivery_id: UUID
    session_key: str
    row: OutboxRow


class Completion(NamedTuple):
    """The run ends with a reply, and the lane's item with it."""

    seq: int
    may_go_on: bool
    reply: bytes
    calls: bytes | None
    message: ReplyMessage | None
    """None if the run did not come from a channel."""


@dataclass(eq=False)
class RunWrite:
    """The records that one run makes at once. Nothing of it is written if it is refused."""

    lease: Lease
    run_id: UUID
    tenant_id: str
    version: int
    """Of the run's stream before this write. It is the number of the run's events."""
    out: Tx
    """Collects the messages for the buses."""
    begins: bool = False
    """Refused with RunStopped if the run is to be cancelled or is over."""
    expected_messages: int | None = None
    """Refused with MessagesArrived if the run has another number of messages."""
    events: list[tuple[UUID, Event]] = field(default_factory=list)
    started_model: str | None = None
    """The run starts; the model under which it is counted."""
    begun: list[Begun] = field(default_factory=list)
    ended: list[EndedStep] = field(default_factory=list)
    used: list[Used] = field(default_factory=list)
    completion: Completion | None = None
    recorded: list[Callable[[], None]] = field(default_factory=list)
    """Called after the commit."""

    # Known after the commit.
    messages: int = 0
    """How many messages the run has."""
    next: LaneHead | None = None
    """The lane's next item, if this write has ended one and may go on."""

    def continue_from(self, held: RunWrite) -> None:
        """Puts all parts of `held`, which was not submitted, before those of this write."""
        self.version = held.version
        self.begins = self.begins or held.begins
        self.started_model = held.started_model
        self.events = held.events + self.events
        self.begun = held.begun + self.begun
        self.ended = held.ended + self.ended
        self.used = held.used + self.used
        self.recorded = held.recorded + self.recorded
        self.out.put_messages(held.out.messages)


class GroupWriter:
    """Commits the writes of all runs of this process, in the order in which they were submitted."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.commits = GroupCommit(self._commit, largest=LARGEST_GROUP)

    def submit(self, write: RunWrite) -> asyncio.Future[None]:
        """Done after the commit. Raises LaneLost, RunStopped, MessagesArrived; Conflict if the run's journal has moved
        on; the database's transient error if it did not come back in time.
        """
        done = self.commits.submit(write)
        # The worker may be cancelled before it awaits the result.
        done.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return done

    async def _commit(self, group: Sequence[RunWrite]) -> Mapping[int, Exception]:
        started, attempt = time.monotonic(), 0
        while True:
            try:
                rows = await self._call(group, repeated=attempt > 0)
                break
            except Exception as error:
                if isinstance(error, DBAPIError) and sqlstate(error) == CONFLICT:
                    raise Conflict("a run's journal has moved on") from error
                if not is_transient(error) or time.monotonic() - started > RETRY_SECONDS:
                    raise
            if attempt == 0:
                _log.warning("could not record the steps of runs; will retry", writes=len(group))
            await asyncio.sleep(RETRY_PAUSES[min(attempt, len(RETRY_PAUSES) - 1)])
            attempt += 1
        refused: dict[int, Exception] = {}
        for index, (write, (refusal, messages, *head)) in enumerate(zip(group, rows, strict=True)):
            write.messages = messages
            write.next = None if head[0] is None else LaneHead(*head)
            if refusal:
                refused[index] = _refused(refusal, write)
                continue
            for call in write.recorded:
                call()
        return refused

    async def _call(self, group: Sequence[RunWrite], *, repeated: bool) -> Sequence[tuple[Any, ...]]:
        ends_steps = any(write.ended for write in group)
        ends_items = any(write.completion for write in group)
        if ends_items:
            failpoint("before_lane_commit")
        failpoint("before_commit")
        rows = await self._database.autocommit(_CALL, *_columns(group, repeated=repeated))
        failpoint("after_commit")
        if ends_steps:
            failpoint("after_effect_commit")
        buses = {row.bus for write in group for row in write.out.messages}
        self._database.wake(buses | {"rabbit"} if ends_items else buses)
        return rows


def _refused(refusal: str, write: RunWrite) -> Exception:
    match refusal:
        case "lost":
            return write.lease.lost()
        case "stopped":
            return RunStopped()
        case _:
            return MessagesArrived()


# The columns of the call: name of each table of arguments → types of its columns. The tables stand in the order of the
# function's parameters.
_TABLES: dict[str, tuple[str, ...]] = {
    "write": ("bigint", "bigint", "uuid", "text", "boolean", "bigint", "bigint"),
    "event": ("int", "int", "uuid", "text", "int", "bytea", "text"),
    "started": ("int", "text"),
    "begun": ("int", "int", "text", "text", "int", "text"),
    "ended": ("int", "int", "text", "int", "text"),
    "used": ("int", "text", "text", "text", "boolean", "timestamptz", "bigint", "bigint", "bigint"),
    "out": ("int", "text", "smallint", "uuid", "text", "text", "text", "text", "bytea", "interval"),
    "done": ("int", "bigint", "boolean", "bytea", "bytea"),
    "reply": ("int", "text", "uuid", "smallint", "uuid", "text", "text", "text", "text", "bytea", "interval"),
}


def _statement() -> str:
    parameters: list[str] = []
    for table, types in _TABLES.items():
        for type_ in types:
            parameters.append(f"${len(parameters) + 1}::{type_}[]")
        if table == "write":
            parameters.append(f"${len(parameters) + 1}::boolean")
    return f"SELECT * FROM write_runs({', '.join(parameters)})"


_CALL = _statement()


def _columns(group: Sequence[RunWrite], *, repeated: bool) -> list[Any]:
    """The arguments of the call, in the order of the function's parameters."""
    rows: dict[str, list[tuple[Any, ...]]] = {table: [] for table in _TABLES}
    for w, write in enumerate(group, 1):
        lease = write.lease
        rows["write"].append(
            (
                lease.lane_id,
                lease.epoch,
                write.run_id,
                write.tenant_id,
                write.begins,
                write.expected_messages,
                write.version,
            )
        )
        headers = msgspec.json.encode({"tenant_id": write.tenant_id} if write.tenant_id else {}).decode()
        for version, (event_id, event) in enumerate(write.events, write.version + 1):
            kind = type(event)
            data = msgspec.json.encode(event)
            rows["event"].append((w, version, event_id, kind.__name__, schema_version(kind), data, headers))
        if write.started_model is not None:
            rows["started"].append((w, write.started_model))
        rows["begun"] += [(w, *begun) for begun in write.begun]
        rows["ended"] += [(w, *ended) for ended in write.ended]
        for record, usage in write.used:
            quantities = msgspec.json.encode(record.quantities).decode()
            figures = usage.input_tokens, usage.cached_tokens, usage.output_tokens
            rows["used"].append(
                (w, record.usage_id, record.resource, quantities, record.estimated, record.occurred_at, *figures)
            )
        rows["out"] += [(w, row.bus, row.bucket, *row[1:]) for row in write.out.messages]
        if done := write.completion:
            rows["done"].append((w, done.seq, done.may_go_on, done.reply, done.calls))
            if done.message:
                rows["reply"].append((w, *_reply(done.message)))
    arguments: list[Any] = []
    for table, types in _TABLES.items():
        arguments += [list(column) for column in zip(*rows[table], strict=True)] or [[] for _ in types]
        if table == "write":
            arguments.append(repeated)
    return arguments


def _reply(message: ReplyMessage) -> tuple[Any, ...]:
    row = message.row
    # The call appends the position and the closing brace.
    body = row.body.removesuffix(b"0}")
    assert body.endswith(b'"position":')
    assert '"ce_sequence":"0"' in row.headers
    return (
        message.session_key,
        message.delivery_id,
        row.bucket,
        row.message_id,
        row.destination,
        row.routing_key,
        row.key,
        row.headers,
        body,
        row.keep_for,
    )
