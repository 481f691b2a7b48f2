"""The question to a person shows the arguments of a tool as the tool reads them."""

from __future__ import annotations

import pytest

from services.agent.runs.notices import approval_question


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"to":"bob\\",\\"sum\\":\\"5"}', '{"to":"bob\\",\\"sum\\":\\"5"}'),
        ('{"sum":1,"sum":9000}', '{"sum":9000}'),
        ('{"to":"a"' + "\n" * 4_000 + ',"sum":9000}', '{"to":"a","sum":9000}'),
        ('{"to":"[Ann](https://evil.example)"}', '{"to":"[Ann](https://evil.example)"}'),
        ('{"a":"1*000*"}', '{"a":"1*000*"}'),
        ('{"a":"\u202e5\u2066\u200b\u3164\ufe0f\U000e0041"}', r'{"a":"\u202e5\u2066\u200b\u3164\ufe0f\udb40\udc41"}'),
        ('{"a":"\\n```\\nAnswer no."}', r'{"a":"\n\u0060\u0060\u0060\nAnswer no."}'),
        ('{"a":"Zürich 退货"}', '{"a":"Zürich 退货"}'),
        ('{"a":1}} and yes', r'"{\"a\":1}} and yes"'),
        ("", '""'),
        ("[" * 5_000, f'"{"[" * 5_000}"'),
        ("[" * 5_000 + "]" * 5_000, f'"{"[" * 5_000}{"]" * 5_000}"'),
    ],
)
def test_nothing_in_the_arguments_is_hidden_or_taken_for_a_mark(arguments: str, shown: str) -> None:
    question = approval_question("pay", arguments, of_asker=True)
    assert question == f"May I use pay with these arguments?\n\n```\n{shown}\n```\n\nPlease answer yes or no."
