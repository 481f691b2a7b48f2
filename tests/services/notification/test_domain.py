"""Addresses, subjects, and the shown parts of an e-mail."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import protos
from protos.messages.billing import BudgetThresholdPassed
from services.notification.domain import (
    SendResult,
    is_address,
    is_file,
    is_one_line,
    masked,
    refusal_text,
    result_of_all,
)
from services.notification.webhooks.events import event_of


@pytest.mark.parametrize(
    "text", ["a@example.com", "first.last+tag@mail.example.co", "root@localhost", "用户@例子.中国"]
)
def test_an_address_is_accepted(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nobody",
        "@example.com",
        "a@",
        "a@b@example.com",
        "a@example.com\r\nBcc: b@example.com",
        "a@example.com\n",
        "a@example.com, b@example.com",
        "a@example.com;b@example.com",
        "Somebody <a@example.com>",
        "a b@example.com",
        "a@example.com\x00",
        "a@-oOption",
        "a\u2028@example.com",
        "a" * 65 + "@example.com",
        "=?utf-8?b?eEB5LnosIGFAYi5j?=@example.com",
        "a@example..com",
        "a@.example.com",
        "a@example.com.",
    ],
)
def test_what_is_not_one_address_is_refused(text: str) -> None:
    assert not is_address(text)


@pytest.mark.parametrize(
    "text", ["a\r\nBcc: b@example.com", "a\nb", "a\n", "a\r", "a\x00b", "a\u2028b", "a\x85b", "a\x0bb"]
)
def test_a_subject_of_more_than_one_line_is_refused(text: str) -> None:
    assert not is_one_line(text)


@pytest.mark.parametrize("text", ["", "Budget nearly spent", "预算 🙂 – 90 %", "a\tb"])
def test_a_subject_of_one_line_is_accepted(text: str) -> None:
    assert is_one_line(text)


def test_an_address_is_masked() -> None:
    assert [masked(address) for address in ("owner@example.com", "o@example.com")] == ["o***@example.com"] * 2


def test_a_refusal_is_told_without_the_servers_words() -> None:
    assert refusal_text(550, "5.1.1 <a@example.com> unknown") == "refused by the mail server: 550 5.1.1"
    assert refusal_text(554, "<a@example.com> unknown") == "refused by the mail server: 554"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([], SendResult("failed", "the tenant has no owner with an address")),
        ([None], SendResult("sent", "")),
        ([None, None], SendResult("sent", "")),
        (["full", "gone", "gone"], SendResult("failed", "full; gone")),
        ([None, "gone"], SendResult("sent", "1 of 2 recipients: gone")),
    ],
)
def test_a_mail_is_sent_if_one_recipient_has_it(errors: list[str | None], expected: SendResult) -> None:
    assert result_of_all(errors) == expected


@pytest.mark.parametrize(
    ("name", "media_type", "expected"),
    [
        ("INV-000001.pdf", "application/pdf", True),
        ("../a.pdf", "application/pdf", False),
        ('a".pdf', "application/pdf", False),
        ("a.pdf\r\nBcc: b@example.com", "application/pdf", False),
        ("a.pdf", "application/pdf\r\nBcc: b@example.com", False),
        ("a.pdf", "pdf", False),
    ],
)
def test_an_attachment_has_a_plain_name_and_a_media_type(name: str, media_type: str, expected: bool) -> None:
    assert is_file(name, media_type) is expected


def test_a_passed_threshold_of_a_budget_is_an_event() -> None:
    content = (Path(protos.__file__).parent / "schemas/golden/billing.v1.BudgetThresholdPassed.json").read_bytes()
    event = event_of(msgspec.json.decode(content, type=BudgetThresholdPassed))
    assert event is not None
    assert event.type == "budget.threshold"
    assert msgspec.to_builtins(event.data) == {
        k: v for k, v in msgspec.json.decode(content).items() if k != "tenant_id"
    }
