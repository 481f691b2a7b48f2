"""``scripted/answer``: a deterministic model made of rules, for work offline.

It answers with the sentences of the passages that share most words with the question, and names their sources. It
calls a calculator tool for a sum. Its answers say that no language model was called.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log
from typing import Any

import msgspec

from services.agent.models.contract import (
    AssistantTurn,
    ModelAnswer,
    ModelFailed,
    OnText,
    Passage,
    Prompt,
    Tool,
    ToolCall,
    ToolTurn,
    Usage,
    UserTurn,
)

NAME = "scripted/answer"
LABEL = "(Offline demonstration: quoted by rules, no language model was asked.)"
# The number of sentences in an answer, and the smallest share of the question's weight that a sentence must have.
SENTENCES = 2
ENOUGH = 0.25

_WORD = re.compile(r"[^\W_]+")
_IDEOGRAPHS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？；])|\n+")
# Of at most 60 characters between operators: each digit of a long row is tried as the beginning.
_SUM = re.compile(r"[(\d][\d\s.()]{0,60}+(?:[-+*×/÷^][\d\s.()]{1,60}+)+")
# Without one of these the text may be a date or a telephone number.
_SURELY = re.compile(r"[+*×÷^]|\s[-/]\s")
_COMMON_WORDS = (
    "a, an, and, any, are, as, at, be, but, by, can, could, did, do, does, for, from, had, has, have, how, i, if, "
    "in, into, is, it, its, me, my, no, not, of, on, or, our, please, shall, should, so, tell, than, that, the, "
    "their, them, then, there, these, they, this, to, us, was, we, were, what, when, where, which, who, whom, why, "
    "will, with, would, you, your, about"
)
_COMMON = frozenset(_COMMON_WORDS.split(", "))


class Scripted:
    """The scripted model."""

    async def answer(self, prompt: Prompt, on_text: OnText) -> ModelAnswer:
        """Raises ModelFailed if there is no message to answer."""
        asked = [n for n, turn in enumerate(prompt.turns) if isinstance(turn, UserTurn)]
        if not asked:
            raise ModelFailed(f"{NAME}: there is no message to answer", transient=False)
        last = prompt.turns[asked[-1]]
        assert isinstance(last, UserTurn)
        results = [turn for turn in prompt.turns[asked[-1] :] if isinstance(turn, ToolTurn)]
        call = None if results else _sum_to_work_out(last.text, prompt.tools)
        text = "" if call else f"{_reply(last.text, results, prompt.passages)}\n\n{LABEL}"
        for piece in re.findall(r"\S*\s*", text):
            if piece:
                await on_text(piece)
        calls = (call,) if call else ()
        usage = Usage(
            input_tokens=_tokens(_everything(prompt)),
            cached_tokens=0,
            output_tokens=_tokens([text, *(c.arguments for c in calls)]),
            reasoning_tokens=0,
        )
        return ModelAnswer(text, calls, usage, NAME, "tool_call" if call else "stop")


def _sum_to_work_out(question: str, tools: Sequence[Tool]) -> ToolCall | None:
    calculator = next((tool for tool in tools if "calc" in tool.name.lower()), None)
    expression = next((found.strip(" .\n") for found in _SUM.findall(question) if _SURELY.search(found)), None)
    if calculator is None or expression is None:
        return None
    properties: dict[str, Any] = calculator.schema.get("properties", {})
    argument = next((name for name, schema in properties.items() if schema.get("type") == "string"), None)
    if argument is None:
        return None
    arguments = {argument: expression.translate(str.maketrans("×÷", "*/"))}
    return ToolCall("call_1", calculator.name, msgspec.json.encode(arguments).decode())


def _reply(question: str, results: Sequence[ToolTurn], passages: Sequence[Passage]) -> str:
    if results:
        return "\n".join(f"The tool {result.call.name} says: {_plain(result.content)}" for result in results)
    if found := _best_sentences(question, passages):
        return "\n".join(f"{sentence} [{passage.place}]" for sentence, passage in found)
    return "I have found nothing about this in the documents that I know."


def _plain(content: str) -> str:
    """The field ``result`` if the tool's answer is an object with one; else the whole answer."""
    try:
        answer = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return content
    return str(answer["result"]) if isinstance(answer, dict) and "result" in answer else content


def _best_sentences(question: str, passages: Sequence[Passage]) -> list[tuple[str, Passage]]:
    """The sentences that share most terms with the question. A rare term counts more than a frequent one."""
    wanted = _terms(question)
    sentences = [
        (sentence.strip(), passage)
        for passage in passages
        for sentence in _SENTENCE_END.split(passage.text)
        if _WORD.search(sentence) and not sentence.lstrip().startswith("#")
    ]
    spread = Counter(term for sentence, _ in sentences for term in _terms(sentence) & wanted)
    weight = {term: log(1 + len(sentences) / (1 + spread[term])) for term in wanted}
    total = sum(weight.values())

    def score(found: tuple[str, Passage]) -> float:
        return sum(weight[term] for term in _terms(found[0]) & wanted) / total

    # Among equal scores the order of the passages decides: the best passage comes first.
    best = sorted(sentences, key=score, reverse=True)[:SENTENCES] if total else []
    return [found for n, found in enumerate(best) if score(found) >= (ENOUGH if n == 0 else 2 * ENOUGH)]


def _terms(text: str) -> set[str]:
    """Rough stems of words, and pairs of ideographs, because ideographic text has no spaces between words."""
    words = {_stem(word) for word in _WORD.findall(_IDEOGRAPHS.sub(" ", text).lower()) if word not in _COMMON}
    return words | {run[n : n + 2] for run in _IDEOGRAPHS.findall(text) for n in range(max(1, len(run) - 1))}


def _stem(word: str) -> str:
    for ending in ("ing", "ies", "ed", "es", "s"):
        if len(word) > len(ending) + 3 and word.endswith(ending):
            return word.removesuffix(ending)
    return word


def _everything(prompt: Prompt) -> Iterable[str]:
    yield prompt.system
    for passage in prompt.passages:
        yield passage.text
    for tool in prompt.tools:
        yield tool.description
    for turn in prompt.turns:
        match turn:
            case UserTurn(text):
                yield text
            case AssistantTurn(text, calls):
                yield text
                yield from (call.arguments for call in calls)
            case ToolTurn(_, content):
                yield content


def _tokens(texts: Iterable[str]) -> int:
    """A rough count of tokens: one per ideograph, and one per four characters of a word, rounded up."""
    return sum(
        sum(-(-len(word) // 4) for word in _WORD.findall(_IDEOGRAPHS.sub(" ", text)))
        + sum(len(run) for run in _IDEOGRAPHS.findall(text))
        for text in texts
    )
