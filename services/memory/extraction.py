"""Finds facts about a person in their own words, by rules. Pure. It never reads the reply or the output of tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["fact", "preference", "decision", "promise"]

MAX_FACTS = 10
MAX_TEXT = 500
# Shorter words are in many sentences and prove nothing.
MIN_QUOTE = 3


class LearnedFact(NamedTuple):
    text: str
    """The person's own sentence."""
    kind: Kind
    importance: int
    """From 1 to 10."""
    topic: str | None = None
    """Of two facts with one topic, the newer one is true."""


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    kind: Kind
    importance: int
    topic: str | None = None
    """With `{}` for the first group."""


def _rule(pattern: str, kind: Kind, importance: int, topic: str | None = None) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), kind, importance, topic)


_I = r"\bI(?: a|['’])m\b"
_OBJECT = r"([^,;.!]{2,60})"
# The first rule that fits a sentence decides.
_RULES = (
    _rule(rf"{_I}(?: not| severely| very| no longer)? allergic to {_OBJECT}", "fact", 9, "allergy {}"),
    _rule(r"我对([^,，。；;！]{1,30}?)(?:不再|不|严重|有点)*过敏", "fact", 9, "allergy {}"),
    _rule(rf"{_I}(?: not| no longer)? an? (?:vegetarian|vegan|pescatarian|diabetic|coeliac|celiac)", "fact", 8, "diet"),
    _rule(rf"{_I}(?: not| no longer)? (?:vegetarian|vegan|pescatarian|diabetic)", "fact", 8, "diet"),
    _rule(r"我(?:现在)?(?:吃素|不吃素|是素食)", "fact", 8, "diet"),
    _rule(r"\bmy name is \w|\bcall me [A-Z]", "fact", 7, "name"),
    _rule(r"我叫|我的名字是|请叫我", "fact", 7, "name"),
    _rule(r"\bI(?: now)? live in|\bI(?:['’]ve| have)? moved to", "fact", 6, "home"),
    _rule(r"我(?:现在)?住在|我搬到", "fact", 6, "home"),
    _rule(r"\bI(?: now)? work (?:at|for|as|in)\b", "fact", 6, "work"),
    _rule(r"我(?:现在)?在[^,，。；;！]{1,20}(?:工作|上班)", "fact", 6, "work"),
    _rule(r"\bmy birthday is|\bI was born (?:on|in)\b|我的生日是|我出生", "fact", 7, "birthday"),
    _rule(
        rf"\bI (?:do not |don['’]t |really |now |no longer )*(?:like|love|prefer|enjoy|hate|dislike) {_OBJECT}",
        "preference",
        5,
        "taste {}",
    ),
    _rule(
        r"我(?:现在|很|非常|最|不再|不)*(?:喜欢|爱吃|爱喝|讨厌|偏好)([^,，。；;！]{1,30})", "preference", 5, "taste {}"
    ),
    _rule(r"\b(?:we|I)(?: have|['’]ve)? (?:decided|agreed) (?:to|on|that)\b|我们?决定", "decision", 6),
    _rule(r"\bI promise\b|我(?:答应|保证)", "promise", 6),
    _rule(r"^(?:please )?(?:remember|note)(?: that|:) |^请?记住", "fact", 8),
)
# A wish to have something forgotten. If its sentence were learned, the very thing to forget would be remembered.
_FORGET = re.compile(
    r"(?i)^(?:(?:can|could|would|will) you )?(?:please )?(?:forget|delete|erase|remove|do(?:n['’]t| not) remember)\b"
    r"|^请?你?(?:忘记|忘掉|忘了|删除|删掉|不要记|别记)"
)
_SENTENCE = re.compile(r"[^.!?。！？；\n]+(?:[.!?。！？；]+|\n|$)")
_AFTERWARDS = re.compile(r"(?i)\s+(?:any ?more|any longer|very much|a lot|now|at all|too|again|的|了)+$")
_NOT_LETTERS = re.compile(r"[^\w]+")


def facts(said: str) -> list[LearnedFact]:
    """The facts in a person's message, at most MAX_FACTS. A question and a wish to forget state none."""
    found: dict[str, LearnedFact] = {}
    for sentence in _sentences(said):
        if sentence.endswith(("?", "？")) or len(sentence) > MAX_TEXT:
            continue
        if _FORGET.match(sentence):
            continue
        for rule in _RULES:
            if part := rule.pattern.search(sentence):
                topic = rule.topic.format(_object(part[1])) if rule.topic and "{}" in rule.topic else rule.topic
                found.setdefault(normal(sentence), LearnedFact(sentence, rule.kind, rule.importance, topic))
                break
    return list(found.values())[:MAX_FACTS]


def is_stated(quote: str, said: str) -> bool:
    """Whether a person said these words, and not in a question or in a wish to have them forgotten."""
    wanted = normal(quote)
    stated = (sentence for sentence in _sentences(said) if not sentence.endswith(("?", "？")))
    kept = normal(" ".join(sentence for sentence in stated if not _FORGET.match(sentence)))
    return len(wanted) >= MIN_QUOTE and wanted in kept


def _sentences(text: str) -> Iterator[str]:
    for match in _SENTENCE.finditer(text):
        if sentence := match[0].strip():
            yield sentence


def normal(text: str) -> str:
    """The form in which two texts that say the same are equal: letters and digits in lower case."""
    return _NOT_LETTERS.sub(" ", text.lower()).strip()


def _object(text: str) -> str:
    return normal(_AFTERWARDS.sub("", text.strip()))
