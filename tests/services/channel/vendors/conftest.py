from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from infra.clock import utcnow
from infra.errors import Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Outbound, Request
from services.channel.vendors.items import Item, Received
from services.channel.vendors.teams import _Key
from tooling.testing.vendors import TeamsStandIn
from tooling.testing.vendors.server import StandIn
from tooling.testing.vendors.teams import published

Call = tuple[bytes, dict[str, str]]


@pytest.fixture
async def outgoing() -> AsyncIterator[Outgoing]:
    client = Outgoing(allow_private=True)
    yield client
    await client.close()


class Adapter:
    """One adapter with the credentials of its fake."""

    def __init__(self, name: str, fake: StandIn, outgoing: Outgoing) -> None:
        self.vendor = VENDORS[name]
        self.fake = fake
        self.outgoing = outgoing
        given: dict[str, str] = fake.credentials  # type: ignore[attr-defined]
        self.credentials = self.vendor.credentials(**given)

    def receive(self, call: Call, *, method: str = "POST", query: str = "", url: str = "") -> Received:
        body, headers = call
        return self.vendor.receive(Request(method, query, headers, body, url), self.credentials, utcnow())

    def one(self, call: Call, **request: str) -> Item:
        [item] = self.receive(call, **request).items
        return item

    async def send(self, text: str = "hello", to: str = "1", key: str = "d1", **fields: Any) -> str | None:
        return await self.vendor.send(self.outgoing, self.fake.url, self.credentials, Outbound(key, to, text, **fields))


def assert_every_change_is_refused(call: Call, proofs: tuple[str, ...], receive: Callable[[Call], object]) -> None:
    """A genuine call is accepted. It is refused with one byte changed, and without or with another of its proofs."""
    body, headers = call
    receive(call)
    changed: list[Call] = [(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], headers) for at in range(len(body))]
    changed += [(body + b" ", headers), (body[:-1], headers)]
    for name in proofs:
        value = headers[name]
        changed.append((body, {other: kept for other, kept in headers.items() if other != name}))
        others = ("", value[:-1], value + "0", f"\xfc{value}", value.swapcase(), "0" * len(value))
        changed += [(body, headers | {name: other}) for other in others if other != value]
    for forged in changed:
        with pytest.raises(Unauthenticated):
            receive(forged)


def keys_of(fake: TeamsStandIn) -> dict[str, _Key]:
    """The published keys of the fake as the service has read them."""
    return msgspec.convert(published(fake), dict[str, _Key])
