"""Reads agent.events from its end, and passes the facts to the hub."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from protos.catalog import AGENT_EVENTS
from protos.envelope import Message
from protos.messages.agent import RunMessageDeleted
from services.ws_gateway.domain import Fact
from services.ws_gateway.hub import Hub


async def note_gap(hub: Hub) -> None:
    """The tail begins, or begins again: facts before it may be missing."""
    hub.missed()


@AGENT_EVENTS.tail(group="ws_gateway", begins=note_gap)
async def pass_on(message: Message, headers: Mapping[str, str], hub: Hub) -> None:
    if isinstance(message, RunMessageDeleted):
        return  # Not an event of a run's journal: it has no number there.
    data = msgspec.to_builtins(message)
    hub.fact(Fact(data["n"], message.wire_name(), headers["ce_time"], data))
