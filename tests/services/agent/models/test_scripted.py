"""The offline model is deterministic."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from services.agent.models.contract import (
    AssistantTurn,
    ModelAnswer,
    ModelFailed,
    Passage,
    Prompt,
    Tool,
    ToolTurn,
    UserTurn,
)
from services.agent.models.scripted import LABEL, Scripted

HANDBOOK = (
    Passage(
        "# Returns\nYou can return a product within 30 days. Keep the receipt. A refund takes five working days.",
        0.9,
        "d1",
        "handbook.md",
        "Returns",
    ),
    Passage("Our shop in Bern opens at nine. Shipping abroad costs 12 francs.", 0.8, "d1", "handbook.md", "Shop", 3),
    Passage("保修期为两年。退货需要在三十天内办理。", 0.7, "d2", "手册.md"),
)


def calculator(**properties: Any) -> Tool:
    return Tool("calculator", "Works out a sum.", {"type": "object", "properties": properties})


async def ask(question: str, *, passages: tuple[Passage, ...] = (), tools: tuple[Tool, ...] = ()) -> ModelAnswer:
    heard: list[str] = []

    async def hear(text: str) -> None:
        heard.append(text)

    answer = await Scripted().answer(Prompt("", (UserTurn(question),), passages, tools), hear)
    assert "".join(heard) == answer.text
    return answer


@pytest.mark.parametrize(
    ("question", "sentence", "source"),
    [
        ("How long can I return a product?", "You can return a product within 30 days.", "handbook.md, Returns"),
        ("When will I get my refund?", "A refund takes five working days.", "handbook.md, Returns"),
        ("What is the cost of shipping abroad?", "Shipping abroad costs 12 francs.", "handbook.md, Shop, page 3"),
        ("保修期多长？", "保修期为两年。", "手册.md"),
    ],
)
async def test_it_quotes_the_sentence_that_fits_with_its_source(question: str, sentence: str, source: str) -> None:
    answer = await ask(question, passages=HANDBOOK)
    assert answer.text.startswith(f"{sentence} [{source}]")
    assert answer.text.endswith(LABEL)
    assert await ask(question, passages=HANDBOOK) == answer


@pytest.mark.parametrize("passages", [(), HANDBOOK])
async def test_it_says_that_it_found_nothing(passages: tuple[Passage, ...]) -> None:
    answer = await ask("Who won the chess championship?", passages=passages)
    assert answer.text == f"I have found nothing about this in the documents that I know.\n\n{LABEL}"


@pytest.mark.parametrize(
    ("question", "expression"),
    [
        ("What is 17 * (2 + 3)?", "17 * (2 + 3)"),
        ("12×3 please.", "12*3"),
        ("Tell me 10 - 4.", "10 - 4"),
        ("Is it open on 2026-05-01?", None),
        ("Call 031 555-1234", None),
        ("I have 3 dogs", None),
    ],
)
async def test_a_sum_goes_to_the_calculator_once(question: str, expression: str | None) -> None:
    tools = (calculator(expression={"type": "string"}),)
    answer = await ask(question, tools=tools)
    arguments = [msgspec.json.decode(call.arguments) for call in answer.calls]
    assert arguments == ([{"expression": expression}] if expression else [])
    if expression:
        for result in ('{"result":"85","exact":true}', "85"):
            turns = (UserTurn(question), AssistantTurn("", answer.calls), ToolTurn(answer.calls[0], result))
            after = await Scripted().answer(Prompt("", turns, tools=tools), _ignore)
            assert (after.calls, after.text) == ((), f"The tool calculator says: 85\n\n{LABEL}")


async def test_without_a_calculator_that_takes_text_there_is_no_call() -> None:
    assert (await ask("1 + 2", tools=(calculator(n={"type": "number"}),))).calls == ()
    assert (await ask("1 + 2")).calls == ()


async def test_it_counts_tokens() -> None:
    short, long = await ask("Hello"), await ask("Hello there, dear machine 你好")
    assert (short.usage.input_tokens, long.usage.input_tokens) == (2, 9)
    assert short.usage.output_tokens


async def test_without_a_message_it_fails() -> None:
    with pytest.raises(ModelFailed):
        await Scripted().answer(Prompt("", ()), _ignore)


async def _ignore(text: str) -> None:
    pass
