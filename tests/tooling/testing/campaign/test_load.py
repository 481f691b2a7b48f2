"""The calls that the clients of a campaign make."""

from __future__ import annotations

import time
from typing import cast

import pytest

from tooling.testing.campaign.load import Tenant, _message
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
