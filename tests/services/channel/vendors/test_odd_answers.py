"""Answers of any content and conversations of any form: each call of an adapter ends with one of its errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import product
from typing import Any

import httpx2
import msgspec
import pytest

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered
from infra.outgoing.client import Answer
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Outbound, Vendor
from tests.services.channel.vendors.mutated import DEEP, MADE

ORIGIN = "http://127.0.0.1:9"
TOKENS = (
    b'"access_token":"t","tenant_access_token":"t","accessToken":"t","expires_in":7200,"expire":7200,"expireIn":7200'
)
BODIES = (
    DEEP.encode(),
    b'{"ok":true,"result":null,' + TOKENS + b"}",
    b'{"ok":true,"result":{"message_id":"x"},"code":0,"errcode":0,"data":null,"messages":null,' + TOKENS + b"}",
    b'{"ok":false,"parameters":{"retry_after":1e300},"retry_after":1e300,' + TOKENS + b"}",
    b'{"errcode":' + b"[" * 3_000,
)
CONVERSATIONS = ("42", "42/abc", f"42/{'9' * 5_000}", "9" * 5_000, "-", "", "/", "a/b/c/d", "1@", "user/", "\u0663")
Call = Callable[[Vendor[Any], Any, Any, Outbound], Awaitable[object]]
CALLS: dict[str, Call] = {
    "send": lambda vendor, http, credentials, message: vendor.send(http, ORIGIN, credentials, message),
    "draft": lambda vendor, http, credentials, message: vendor.draft(http, ORIGIN, credentials, message),
    "typing": lambda vendor, http, credentials, message: vendor.show_typing(http, ORIGIN, credentials, message),
    "edit": lambda vendor, http, credentials, message: vendor.edit(http, ORIGIN, credentials, message, "9" * 5_000),
    "retract": lambda vendor, http, credentials, message: vendor.retract(http, ORIGIN, credentials, message, "x"),
    "identify": lambda vendor, http, credentials, _: vendor.identify(http, ORIGIN, credentials),
    "register": lambda vendor, http, credentials, _: vendor.register(http, ORIGIN, credentials, "https://bus.example"),
    "fetch": lambda vendor, http, credentials, _: vendor.fetch(http, vendor.origin, credentials, "http://[", 1_000),
}


class Says:
    """In place of the outgoing HTTP: the same answer to each request."""

    def __init__(self, status: int, body: bytes) -> None:
        self._answer = Answer(status, httpx2.Headers({"retry-after": "9" * 5_000}), body)

    async def request(self, *_: Any, **more: Any) -> Answer:
        return self._answer


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", VENDORS)
async def test_a_call_ends_with_an_error_of_the_adapter(name: str, call: str) -> None:
    vendor = VENDORS[name]
    credentials = msgspec.convert(MADE[name][0], vendor.credentials)
    for status, body in product((200, 429, 503), BODIES):
        for conversation in CONVERSATIONS if call in ("send", "draft", "typing") else CONVERSATIONS[:1]:
            message = Outbound("key", conversation, "hi", reply_to="9" * 5_000, answers="a/b")
            with suppress(EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered):
                await CALLS[call](vendor, Says(status, body), credentials, message)


def test_a_count_of_many_digits_is_no_error() -> None:
    credentials, contents, request = MADE["twilio"]
    call = request(next(one for one in contents if "Body" in one) | {"NumMedia": "1" * 5_000})
    vendor = VENDORS["twilio"]
    assert vendor.receive(call, msgspec.convert(credentials, vendor.credentials), datetime.now(UTC)).items
