"""A run's events in order, each once: the facts of the run and the deltas of its text. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

_EVENTS = {
    "agent.v1.RunStarted": "run.started",
    "agent.v1.StepStarted": "step.started",
    "agent.v1.StepCompleted": "step.completed",
    "agent.v1.RunWaiting": "run.waiting",
    "agent.v1.RunIndeterminate": "run.indeterminate",
    "agent.v1.RunCompleted": "run.completed",
}
# A `RunFailed` becomes `run.<status>`; in older messages the status may be `indeterminate`. Such a run may continue, so
# that event is not an ending.
ENDINGS = frozenset(("run.completed", "run.failed", "run.cancelled", "run.refused"))
# Fields that the event of the reply has, or that only services need.
_HIDDEN = frozenset(
    ("n", "session_key", "reply", "tool_calls", "subject_id", "said", "channel_id", "message_id", "learning")
)


class Fact(msgspec.Struct, frozen=True):
    """A public fact of a run."""

    n: int
    """Counts the facts of the run from 1."""
    type: str
    """The wire name of the message."""
    time: str
    data: dict[str, Any]
    """The body of the message."""

    @property
    def event(self) -> str | None:
        """The name of the event in a stream; None if this version does not know the fact."""
        if self.type == "agent.v1.RunFailed":
            return f"run.{self.data['status']}"
        return _EVENTS.get(self.type)


class Delta(msgspec.Struct, frozen=True):
    """A piece of the text that the model of a step writes."""

    step: int
    attempt: int
    n: int
    """Counts the pieces of the attempt from 1."""
    text: str


class StreamEvent(NamedTuple):
    """An event for the client."""

    name: str
    data: Any
    id: int | None
    """A stream can resume after this id. None for a delta, which is sent only once."""

    def encoded(self) -> bytes:
        id_ = b"" if self.id is None else b"id: %d\n" % self.id
        return b"event: %s\n%bdata: %b\n\n" % (self.name.encode(), id_, msgspec.json.encode(self.data))


class Follow:
    """The position of a stream in a run. `last` is the id of the last event sent. After `ended` no event follows.

    An event has the n of its fact as its id. The end of a run with a reply is one fact and two events: the reply has
    the n of the fact, and `run.completed` has the next number.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.ended = False
        self._attempts: dict[int, int] = {}

    def has_end(self, facts: Iterable[Fact]) -> bool:
        """True if the run has ended and the client has its last event."""
        return any(_last_id(fact) <= self.last and fact.event in ENDINGS for fact in facts)

    def is_known(self, facts: Iterable[Fact]) -> bool:
        """False if no event of these facts has the id of the client's last event."""
        return self.last == 0 or any(fact.n <= self.last <= _last_id(fact) for fact in facts)

    @property
    def read_from(self) -> int:
        """The n after which to read the facts, so that they include the client's last event: it may be the run's
        end."""
        return max(self.last - 2, 0)

    def misses(self, fact: Fact) -> bool:
        """True if facts between the last fact and this one are missing."""
        return fact.n > self.last + 1

    def fact(self, fact: Fact) -> list[StreamEvent]:
        """The events of a fact; empty for a fact that was sent already, and after the end."""
        if _last_id(fact) <= self.last or self.ended:
            return []
        has_reply = fact.n <= self.last
        self.last = _last_id(fact)
        if fact.type == "agent.v1.StepStarted":
            self._attempt(fact.data["step"], fact.data["attempt"])
        if (name := fact.event) is None:
            return []
        self.ended = name in ENDINGS
        body = {key: value for key, value in fact.data.items() if key not in _HIDDEN}
        event = StreamEvent(name, {**body, "time": fact.time}, self.last)
        if name != "run.completed" or has_reply:
            return [event]
        reply = {"run_id": fact.data["run_id"], "text": fact.data["reply"]}
        if calls := fact.data.get("tool_calls"):
            reply["tool_calls"] = calls
        if fact.data.get("finish_reason") == "length":
            reply["finish_reason"] = "content_filter" if fact.data.get("filtered") else "length"
        return [StreamEvent("reply", reply, fact.n), event]

    def delta(self, delta: Delta) -> list[StreamEvent]:
        """The event of a delta; empty if its attempt has been replaced by a later attempt."""
        if self.ended or not self._attempt(delta.step, delta.attempt):
            return []
        return [StreamEvent("delta", delta, None)]

    def _attempt(self, step: int, attempt: int) -> bool:
        """Records the attempt. Returns False if a later attempt of the step is known."""
        latest = max(attempt, self._attempts.get(step, 0))
        self._attempts[step] = latest
        return attempt == latest


def _last_id(fact: Fact) -> int:
    return fact.n + (fact.event == "run.completed")
