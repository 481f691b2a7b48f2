"""Patterns that read a stranger's text end in time linear in it. A matcher holds the whole process while it runs."""

from __future__ import annotations

import io
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from infra.observe.redaction import redacted
from infra.stores.filetypes import HTML, TEXT, content_type
from infra.stores.objects import safe_name
from infra.web import data_urls
from infra.web.raw import RawRequest, RawRoute
from services.agent.models import refusals, scripted
from services.agent.runs.decisions import decision_in
from services.channel.accounts import routing
from services.channel.vendors import teams_activities
from services.plugin.domain import without_base64

MANY = 300_000
# Each took minutes to years with a pattern that is not linear.
ATTACKS: dict[str, Callable[[], object]] = {
    "comments before HTML": lambda: content_type(io.BytesIO(b"<!---->" * 10_000 + b"x"), "a.html"),
    "declarations before HTML": lambda: content_type(io.BytesIO(b"<?xml>" * 10_000 + b"x"), "a.html"),
    "open mentions": lambda: decision_in("<@" * MANY),
    "mentions of Teams without an end": lambda: teams_activities._MENTION.sub("", "<at>" * MANY),
    "tags of Teams without an end": lambda: teams_activities._MENTION.sub("", "<at" * MANY),
    "a row of digits": lambda: scripted._SUM.findall("1" * MANY),
    "a row of digits and spaces": lambda: scripted._SUM.findall("1 " * MANY),
    "labels of links": lambda: data_urls.replaced("![a](" * MANY + ";base64,", lambda *_: ""),
    "a command": lambda: routing._COMMAND.match(" " * MANY),
    "a mention before spaces": lambda: routing._MENTION.match("@" + " " * 50 * MANY),
    "a refusal of a model server": lambda: refusals.found(400, b"toolcallid" * 20 * MANY, {}, set()),
    "headers of a webhook call": lambda: _headers([b"%x" % n for n in (0, *range(MANY))]),
    "lines of base64": lambda: without_base64(("A" * 60 + "\n") * 10_000),
    "a URL in a log line": lambda: redacted("://a:" * MANY),
    "accents of a file name": lambda: safe_name("a" + "\u0301\u0327" * MANY + ".txt"),
    "a token in a log line": lambda: redacted("bearer " + " " * MANY),
}


def _headers(names: list[bytes]) -> object:
    parser = Mock(get_method=Mock(return_value=b"POST"))
    protocol = Mock(parser=parser, headers=[(name, b"") for name in names])
    return RawRequest(protocol, RawRoute("/raw", lambda _: None, max_body=1), is_first=True).headers


@pytest.mark.timeout(120)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_text_takes_no_longer_than_any_other(attack: str) -> None:
    ATTACKS[attack]()


def test_the_patterns_still_find_what_they_look_for() -> None:
    page = b"<!-- a --> <?xml version='1.0'?>\n<!-- <b> -->\n<!DOCTYPE html><p>x"
    assert content_type(io.BytesIO(page), "a.html") == HTML
    assert content_type(io.BytesIO(b"<!-- a --> x"), "a.txt") == TEXT
    assert decision_in("<@U0123|bot> yes") == "approve"
    assert teams_activities._MENTION.sub("", "<at id='1'>Bot &lt;3</at> hello") == "hello"
    assert [found.strip() for found in scripted._SUM.findall("What is (2 + 3) * 4.5, and 10/2?")] == [
        "(2 + 3) * 4.5",
        "10/2",
    ]
