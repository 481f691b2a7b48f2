"""What the gateway hears."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from protos.catalog import AGENT_EVENTS
from protos.envelope import Message
from services.ws_gateway.domain import Fact
from services.ws_gateway.hub import Hub


async def begins(hub: Hub) -> None:
    hub.missed()


@AGENT_EVENTS.tail(group="ws_gateway", begins=begins)
async def show(message: Message, headers: Mapping[str, str], hub: Hub) -> None:
    data = msgspec.to_builtins(message)
    hub.fact(Fact(data["n"], message.wire_name(), headers["ce_time"], data))
