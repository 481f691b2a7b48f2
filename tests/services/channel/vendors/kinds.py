"""The form of the examples: one for each documented kind of message and event, and the text that is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from services.channel.vendors import VENDORS
from services.channel.vendors.base import Request
from services.channel.vendors.items import Item
from tooling.testing.vendors.server import StandIn

URL = "https://bus.example/webhooks/x"
Call = tuple[bytes, dict[str, str]]
Expected = str | type[Item] | None
"""The text that the agent gets, another item, or None: it is ignored for the reason of the table."""


class Examples(NamedTuple):
    fake: StandIn
    request: Callable[[Any], Request]
    """Makes a genuine call of the content of an example."""
    given: dict[str, tuple[Any, Expected]]
    """By kind: the content, in the vendor's shape."""


def posted(call: Call) -> Request:
    return Request("POST", "", call[1], call[0], URL)


def ignored(name: str) -> list[str]:
    """The ignored kinds of a vendor."""
    return [kind for kind, reason in VENDORS[name].kinds.items() if reason]
