"""Messages that decide about a waiting run, and messages that only seem to."""

from __future__ import annotations

import pytest

from services.agent.runs.decisions import decision_in, is_unclear


@pytest.mark.parametrize(
    ("text", "decision", "unclear"),
    [
        ("yes", "approve", False),
        ("@bot yes", "approve", False),
        ("yes @bot", "approve", False),
        ("<@U0123ABC> yes", "approve", False),
        ("<@U0123ABC|bot>, No.", "deny", False),
        ("是的。", "approve", False),
        ("yes please", None, True),
        ("ok but later", None, True),
        ("👍", None, True),
        ("@bot", None, False),
        ("", None, False),
        ("me@example.com", None, False),
        ("What is the weather?", None, False),
        ("Yes, and book a table for two people tonight", None, False),
    ],
)
def test_what_a_message_decides(text: str, decision: str | None, unclear: bool) -> None:
    assert (decision_in(text), is_unclear(text)) == (decision, unclear)
