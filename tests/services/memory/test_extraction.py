"""Facts are found in the words of a person, in both languages, and a question states none."""

from __future__ import annotations

import pytest

from services.memory.extraction import MAX_FACTS, facts


@pytest.mark.parametrize(
    ("said", "kind", "topic"),
    [
        ("Hello! I'm allergic to nuts. What can I order?", "fact", "allergy nuts"),
        ("I am not allergic to nuts anymore.", "fact", "allergy nuts"),
        ("By the way, I am severely allergic to Nuts!", "fact", "allergy nuts"),
        ("你好，我对坚果过敏。有什么推荐？", "fact", "allergy 坚果"),
        ("我对坚果不过敏了。", "fact", "allergy 坚果"),
        ("I live in Oslo.", "fact", "home"),
        ("I've moved to Bergen", "fact", "home"),
        ("我现在住在上海。", "fact", "home"),
        ("My name is Ada Lovelace.", "fact", "name"),
        ("我叫小明", "fact", "name"),
        ("I don't like strong coffee.", "preference", "taste strong coffee"),
        ("I really like strong coffee very much.", "preference", "taste strong coffee"),
        ("我不喜欢浓咖啡。", "preference", "taste 浓咖啡"),
        ("I am a vegetarian.", "fact", "diet"),
        ("我吃素。", "fact", "diet"),
        ("We decided to order the large machine.", "decision", None),
        ("I promise to pay on Friday.", "promise", None),
        ("Please remember that the door code changes on Monday.", "fact", None),
    ],
)
def test_a_statement_is_a_fact(said: str, kind: str, topic: str | None) -> None:
    [fact] = facts(said)
    assert (fact.kind, fact.topic) == (kind, topic)
    assert fact.text in said


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Am I allergic to nuts?",
        "Do I live in Oslo?",
        "What is my name?",
        "我对坚果过敏吗？",
        "The machine leaks.",
        "Thanks!",
        "Forget that I am allergic to nuts.",
        "Could you please forget that I live in Oslo.",
        "Don't remember that my name is Ada.",
        "请忘掉我对坚果过敏。",
    ],
)
def test_questions_and_other_sentences_are_not(said: str) -> None:
    assert facts(said) == []


def test_a_long_message_gives_a_bounded_number_of_facts_in_bounded_time() -> None:
    assert len(facts("".join(f"I live in town {n}. " for n in range(2000)))) == MAX_FACTS
    assert facts("I like " * 600 + "x" * 4000) == []
