"""The calls that the clients of a campaign make."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from tooling.testing.campaign.load import Load, Tenant, _message
from tooling.testing.model_server import Asked, ModelServer
from tooling.testing.system import Company
from tooling.testing.vendors import WebhookStandIn


def test_a_message_that_is_sent_again_is_signed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a repeat after five minutes is refused for its age, and the campaign takes that for a fault."""
    call = _message(Tenant("red", cast(Company, None), "", vendor=WebhookStandIn()), "Hello", 1)
    body, headers = call()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 400)
    again, later = call()
    assert (again, later["webhook-id"]) == (body, headers["webhook-id"])
    assert int(later["webhook-timestamp"]) >= int(headers["webhook-timestamp"]) + 400
    assert later["webhook-signature"] != headers["webhook-signature"]


async def test_a_request_to_the_model_is_counted_and_its_conversation_is_not_kept() -> None:
    """Each request has its whole conversation: kept, those of an hour would take gigabytes."""
    nothing: Any = None
    load = Load(nothing, ModelServer(), 7, duplicates=False, reorder=False, conversations=1, wires=None)
    load.tenants = {name: Tenant(name, nothing, f"canary{name}") for name in ("red", "blue")}
    asked = [
        Asked("", "m", {"tools": [], "messages": [{"role": "user", "content": text}, *more]})
        for text, more in (
            ("c1 compute 3 canaryred", []),
            ("c1 compute 3 canaryred", [{"role": "tool", "content": "42"}]),
            ("a1 message 1 canaryblue", [{"role": "assistant", "content": "canaryred"}]),
        )
    ]
    says = [load._answer(one) for one in asked]
    assert [bool(one.calls) for one in says] == [True, False, False]
    assert [(call.text, call.stage, call.canaries) for call in load.calls_of_model] == [
        ("c1 compute 3 canaryred", 1, ["red"]),
        ("c1 compute 3 canaryred", 2, ["red"]),
        ("a1 message 1 canaryblue", 1, ["red", "blue"]),
    ]
    assert [one.body["messages"] for one in asked] == [[], [], []]
