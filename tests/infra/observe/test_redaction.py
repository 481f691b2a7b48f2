"""Secrets and large values in a log line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from pydantic import SecretStr

from infra.observe.redaction import MAX_ITEMS, MAX_TEXT, redacted


@dataclass
class Account:
    bot_token: str


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("detached")


@pytest.mark.parametrize(
    "value",
    [
        {"password": "hunter2"},
        {"DB_PASSWORD": "hunter2"},
        {"api_key": "hunter2"},
        {"apiKey": "hunter2"},
        {"x-api-key": "hunter2"},
        {"Authorization": "Bearer hunter2"},
        {"botToken": "hunter2"},
        {"secret": ["hunter2"]},
        {"headers": {"set-cookie": "hunter2"}},
        {"outer": [{"access_token": "hunter2"}]},
        {"pin": SecretStr("hunter2")},
        "amqp://user:hunter2@host:5672/vhost",
        "postgresql://user:p@hunter2@host/db",
        "https://hunter2@github.com/x",
        "connect to redis://:hunter2@host:6379/0 failed",
        "GET /me?access_token=hunter2&x=1",
        "token='hunter2'",
        '{"password": "hunter2"}',
        "Authorization: Bearer hunter2hunter2hunter2",
        "sent BEARER hunter2hunter2",
        "sent Basic hunter2hunter2",
        "sent Ba\u017fic hunter2hunter2",
        "n: is no number [type=int_parsing, input_value='hunter2, input_type=str] hunter2', input_type=str]",
        Account("hunter2"),
    ],
    ids=str,
)
def test_secrets_are_masked(value: Any) -> None:
    assert "hunter2" not in json.dumps(redacted(value))


@pytest.mark.parametrize(
    "value",
    [
        {"input_tokens": 12, "token_count": 3, "password": None},
        "http://host:8080/users/@me",
        "mail to ann@example.org: unexpected token in JSON",
        "basic information",
        "amqp://host:5672/vhost",
        [1, 2.5, True, None, "ü"],
    ],
    ids=str,
)
def test_the_rest_is_left_as_it_is(value: Any) -> None:
    assert redacted(value) == value


def test_the_user_and_the_host_of_a_url_stay() -> None:
    assert redacted("amqp://claw:hunter2@host:5672/v") == "amqp://claw:***@host:5672/v"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\xff raw", "\\xff raw"),
        ("lone \ud800", "lone \\ud800"),
        (2**64, "18446744073709551616"),
        (Decimal("1.10"), "1.10"),
        (timedelta(seconds=90), "0:01:30"),
        (Broken(), "<Broken without a text: RuntimeError>"),
        ({1: Broken}, {"1": f"{Broken}"}),
        ({"n": float("nan")}, {"n": None}),
    ],
)
def test_anything_can_be_written_as_json(value: Any, shown: Any) -> None:
    assert json.loads(msgspec.json.encode(redacted(value))) == shown


def test_large_things_are_cut() -> None:
    text = redacted("x" * 20_000_000)
    assert len(text) < MAX_TEXT + 100
    assert text.endswith("(19992000 characters more)")
    assert len(redacted(list(range(MAX_ITEMS + 5)))) == MAX_ITEMS
    endless: list[Any] = []
    endless.append(endless)
    assert len(json.dumps(redacted(endless))) < 1000
