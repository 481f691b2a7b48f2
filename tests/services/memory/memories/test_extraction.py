"""Facts are found in the words of a person, in both languages, and a question states none."""

from __future__ import annotations

import pytest

from protos.messages.channel import FORWARDED, IN_REPLY
from services.memory.memories.extraction import MAX_FACTS, facts, is_stated


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
        ("I am not a vegan any more.", "fact", "diet"),
        ("my name is ada", "fact", None),
        ("你好，我叫小明。", "fact", "name"),
        ("I am allergic to nuts, so please be careful.", "fact", "allergy nuts"),
        ("我对坚果过敏，请注意。", "fact", "allergy 坚果"),
        ("我不喜欢浓咖啡了，太苦了。", "preference", "taste 浓咖啡"),
        ("I promise to pay on Friday.", "promise", None),
        ("Please remember that the door code changes on Monday.", "fact", None),
        ("Please call me Liz.", "fact", "form of address"),
        ("请叫我小王。", "fact", "form of address"),
        ("I moved to Bergen in 2024.", "fact", "home"),
        ("我搬到上海了。", "fact", "home"),
        ("My birthday is on the 3rd of May.", "fact", "birthday"),
        ("I was born on July 12, 1990.", "fact", "birthday"),
        ("My birthday is 12.03.1990.", "fact", "birthday"),
        ("我的生日是五月三日。", "fact", "birthday"),
        ("My name's Ada.", "fact", "name"),
        ("Im allergic to nuts", "fact", "allergy nuts"),
        ("I have a severe allergy to nuts.", "fact", "allergy nuts"),
        ("I have a nut allergy.", "fact", "allergy nut"),
        ("i dont like tea", "preference", "taste tea"),
        ("I no longer live in Oslo.", "fact", None),
        ("I don't work for Acme any more.", "fact", None),
        ("我不住在上海了。", "fact", None),
        ("I'm allergic to nuts, can I eat this?", "fact", "allergy nuts"),
        ("My name is Bob, and what is yours?", "fact", "name"),
        ("我对坚果过敏，有什么推荐？", "fact", "allergy 坚果"),
        ("The doctor told me I am allergic to nuts.", "fact", None),
        ("People think I am vegan.", "fact", None),
        ("医生说我对坚果过敏。", "fact", None),
        ("注意：我对坚果过敏。", "fact", "allergy 坚果"),
        ("As I said, I live in Oslo.", "fact", None),
        ("I told you that I am vegan.", "fact", None),
        ("Update: I live in Bergen.", "fact", "home"),
        ("If you wonder, I live in Oslo.", "fact", "home"),
        ("我跟你说，我对坚果过敏。", "fact", None),
        ('"Hi" is no answer; I live in Oslo.', "fact", "home"),
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
        "Please call me back tomorrow.",
        "Please call me Monday.",
        "我叫了外卖。",
        "我叫他明天来。",
        "我叫的外卖还没到。",
        "我叫车了。",
        "我叫一辆车。",
        "开会前请叫我一声。",
        "明天八点请叫我起床。",
        "Please call me ASAP.",
        "He said 'I live in Oslo'.",
        'My wife said: "Hello. I am allergic to nuts."',
        "“I live in Oslo”, he wrote.",
        "My wife said: I live in Oslo",
        "小明：我住在上海",
        "我的妈妈说：我住在上海",
        "> I live in Oslo.",
        "Tom: I am allergic to nuts",
        "[10:02] Ann Lee: I live in Oslo",
        "```\nI like tea\n```",
        "The text is `I like tea`.",
        "Suppose I live in Oslo.",
        "If I moved to Oslo, it would be far.",
        "I am not sure if I am allergic to nuts.",
        "It is not true that I am allergic to nuts.",
        "Translate: I am allergic to nuts.",
        "Write an email to the shop: My name is Bob.",
        "I like it.",
        "I don't like this answer.",
        "I'm vegan, is that right?",
        "Do I live in Oslo, what do you think?",
        "如果我对坚果过敏，怎么办。",
        "我妈妈说：“我住在上海。”",
        "我对坚果过敏，对吗？",
        "我喜欢这个。",
    ],
)
def test_questions_and_other_sentences_are_not(said: str) -> None:
    assert facts(said) == []


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ("I am diabetic.", "I am vegetarian."),
        ("I am a coeliac.", "I am vegetarian."),
        ("I am a vegetarian.", "I am not a vegan."),
        ("I am vegetarian and diabetic.", "I am vegan."),
        ("I am allergic to nuts, milk and shellfish.", "Yes, I am allergic to nuts."),
        ("I am allergic to nuts, milk.", "I am allergic to nuts, eggs."),
        ("My name is Ann and I am allergic to nuts.", "I am not allergic to milk. I am allergic to nuts."),
        ("I live in Bergen.", "I don't live in Oslo."),
        ("我对坚果、牛奶过敏。", "我对坚果过敏。"),
        ("我叫李明，住在上海。", "我叫小李。"),
        ("My name is Ann.", "My name is misspelled on the invoice."),
        ("My name is Elisabeth.", "Please call me Lisa."),
        ("I live in Oslo.", "I live in a house with a garden."),
        ("I moved to Oslo.", "I've moved to the next step."),
        ("我住在上海。", "我住在一楼。"),
        ("I work at Acme.", "I work as a nurse."),
        ("I work at Acme.", "I work in the morning."),
        ("我在上海工作。", "我在银行工作。"),
        ("My birthday is on 3 May.", "I was born in Oslo."),
        ("My birthday is on 3 May.", "My birthday is next week."),
        ("My birthday is on 3 May.", "My birthday is in 3 weeks."),
        ("I was born on 3 May.", "I was born on a Tuesday."),
        ("我的生日是5月3日。", "我的生日是星期一。"),
        ("I live in Oslo.", "I moved to Windows 11 last week."),
        ("I live in Oslo.", "I have moved to the Pro plan."),
        ("我住在上海。", "我搬到二楼会议室了。"),
        ("I like tea, coffee and milk.", "I like tea."),
        ("我喜欢茶，咖啡。", "我喜欢茶。"),
        (f"我喜欢{'很' * 30}长的散步。", f"我喜欢{'很' * 30}短的散步。"),
        ("I like example.com.", "I like example.org."),
        (f"I like {'very ' * 20}long walks.", f"I like {'very ' * 20}short walks."),
    ],
)
def test_facts_that_are_both_true_have_different_topics(older: str, newer: str) -> None:
    [fact], [*_, other] = facts(older), facts(newer)
    assert fact.topic is None or fact.topic != other.topic


@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("We decided to pay 2.5 million for it. Thanks!", ["We decided to pay 2.5 million for it."]),
        ("My birthday is 12.03.1990.", ["My birthday is 12.03.1990."]),
        ("I live in St. Louis.I work for Dr. No", ["I live in St. Louis.", "I work for Dr. No"]),
        ("My name is J. R. Smith. I like node.js.", ["My name is J. R. Smith.", "I like node.js."]),
        ("Remember that it is order No. 7710. Yes", ["Remember that it is order No. 7710."]),
        ("No. I like tea! So do I. I like plums", ["I like tea!", "I like plums"]),
        ("Note: my page is https://example.com/?id=7.", ["Note: my page is https://example.com/?id=7."]),
        (
            "Please remember that my email is ann.b@example.com.",
            ["Please remember that my email is ann.b@example.com."],
        ),
        ("我对坚果过敏.我住在上海。我吃素", ["我对坚果过敏.", "我住在上海。", "我吃素"]),
        ("I live in the U.K. Do you deliver there?", ["I live in the U.K."]),
        ("I am allergic to penicillin G. What can I take?", ["I am allergic to penicillin G."]),
        (
            "My name is T. Do. I'm allergic to vitamin B. I like tea",
            ["My name is T. Do.", "I'm allergic to vitamin B.", "I like tea"],
        ),
    ],
)
def test_a_sentence_does_not_end_within_a_number_a_name_or_an_address(said: str, texts: list[str]) -> None:
    assert [fact.text for fact in facts(said)] == texts


def test_a_fact_before_a_question_is_stated() -> None:
    said = "I am allergic to penicillin G. What can I take? I live in the U.K."
    assert is_stated("allergic to penicillin G", said)
    assert is_stated("I live in the U.K.", said)
    assert not is_stated("What can I take", said)
    assert is_stated("I live in Oslo", "I live in Oslo, what can I do there?")
    assert not is_stated("live in Oslo", "Do I live in Oslo, what do you think?")


@pytest.mark.parametrize(
    "line",
    [
        FORWARDED,
        IN_REPLY,
        "---------- Forwarded message ---------",
        "-----Original Message-----",
        "Begin forwarded message:",
        "On Mon, 1 Dec 2025 at 10:04, Anna <anna@example.com> wrote:",
    ],
)
def test_the_words_of_another_message_are_not_learned_as_those_of_the_person(line: str) -> None:
    said = f"I live in Oslo. Look:\n\n{line}\n\nI am allergic to fish."
    assert [fact.text for fact in facts(said)] == ["I live in Oslo."]
    assert not is_stated("allergic to fish", said)


def test_a_long_message_gives_a_bounded_number_of_facts_in_bounded_time() -> None:
    assert len(facts("".join(f"I live in town {n}. " for n in range(2000)))) == MAX_FACTS
    assert facts("I like " * 600 + "x" * 4000) == []
    for part in (".", "a.", "No.", "x", "?!", "'a ", '"', "`", "“", "> ", "a:", "I said ", "a, what?"):
        assert facts(part * 100_000 + " \n") == []
