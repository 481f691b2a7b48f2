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
        ("<@U0123ABC|claw bot> yes", "approve", False),
        ("是的。", "approve", False),
        *(
            (text, "approve", False)
            for text in ("ok!", "*Yes*", "“ok”", "(yes)", "ｙｅｓ", "\u200byes\ufe0f", "si\u0301", "yes…")
        ),
        *((text, "approve", False) for text in ("да", "sim", "はい。", "네", "نعم", "@bot: sure")),
        *((text, "deny", False) for text in ("нет", "não", "いいえ", "아니요", "لا", "Nope.", "cancel")),
        *((text, "approve", False) for text in ("行", "嗯", "确认", "确定。", "так", "vale", "Go ahead!")),
        ("/yes@claw_bot", "approve", False),
        *((text, "deny", False) for text in ("取消", "/no@claw_bot")),
        # A question decides nothing.
        *((text, None, True) for text in ("yes?", "ok？", "yes!?", "oui👍", "yes/no", "👍🏽", "no 👎", "not ok")),
        ("yes please", None, True),
        ("ok but later", None, True),
        ("yes, thank you very much", None, True),
        ("Is it ok to go out today?", None, False),
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
