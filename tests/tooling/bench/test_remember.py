"""The conversations of the bench ``remember``."""

from __future__ import annotations

from services.memory.domain import count_tokens
from services.memory.memories.store import TOKENS
from tooling.bench.remember import ATTRIBUTES, PEOPLE, conversation, last_messages, texts_of_templates


def test_each_question_has_its_answer_in_the_messages_and_nowhere_else() -> None:
    values = [value for attribute in ATTRIBUTES.values() for value in attribute.values]
    assert not [value for value in values for text in texts_of_templates() if value in text]
    assert not [(a, b) for a in values for b in values if a != b and a in b]
    for person in range(PEOPLE):
        messages, asked = conversation(person)
        assert (messages, asked) == conversation(person)
        assert [message.at for message in messages] == sorted(message.at for message in messages)
        for each in asked:
            [place] = [n for n, message in enumerate(messages) if each.value in message.text]
            if each.former:
                assert any(each.former in message.text for message in messages[:place])


def test_the_last_messages_fit_into_the_budget() -> None:
    messages, _ = conversation(0)
    chosen = last_messages(messages)
    assert chosen[0] == messages[-1].text
    assert 0 < sum(map(count_tokens, chosen)) <= TOKENS
