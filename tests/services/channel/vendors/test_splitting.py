"""Splitting long texts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from services.channel.vendors import VENDORS
from services.channel.vendors.splitting import split, utf8_length, utf16_length


@given(
    st.text(st.sampled_from("ab \n.。é😀👍🏽\u200d\u0301\u202e\0"), max_size=300),
    st.integers(min_value=2, max_value=40),
)
def test_only_white_space_is_lost_and_every_part_fits(text: str, limit: int) -> None:
    parts = split(text, limit, utf16_length)
    assert all(part.strip() and utf16_length(part) <= limit for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.replace("\0", "").split())


def test_a_short_text_is_left_as_it_is() -> None:
    assert split(" one\n\ntwo ", 20) == ["one\n\ntwo"]
    assert split("\0 \n", 20) == []


def test_the_cut_is_at_the_best_place() -> None:
    assert split("one two three\n\nfour. five six", 22) == ["one two three", "four. five six"]
    assert split("one two three.\nfour five", 16) == ["one two three.", "four five"]
    assert split("one two three. four five", 16) == ["one two three.", "four five"]
    assert split("一二三四五。六七八", 7) == ["一二三四五。", "六七八"]
    assert split("one two three four", 9) == ["one two", "three", "four"]


def test_a_place_in_the_first_half_is_skipped() -> None:
    assert split("a. " + "b" * 8 + " " + "c" * 8, 15) == ["a. bbbbbbbb", "cccccccc"]


def test_a_visible_character_is_not_split() -> None:
    family = "👨\u200d👩\u200d👧"
    assert split("ab" + family, 6) == ["ab", family]
    assert split("abc" + "e\u0301", 4) == ["abc", "e\u0301"]
    assert split("abc" + "👍🏽", 4) == ["abc", "👍🏽"]
    england = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    assert split("abc" + england, 7) == ["abc", england]


@pytest.mark.parametrize(
    ("before", "first", "further", "after"),
    [
        ("10. Do this:\n\n", "    ", "    ", "\n    So it is.\n\n11. Done."),
        ("- Do this:\n  - and this:\n\n", "    ", "    ", "\n- Done."),
        ("", "- ", "  ", "\n  So it is."),
        ("> Do this:\n> ", "", "> ", "\n\nDone."),
        ("", "> > ", "> > ", "\n> Done."),
        ("", "> - ", ">   ", "\n>\n>   So it is."),
        ("", "", "", "\nDone."),
    ],
)
@pytest.mark.parametrize("mark", ["```", "~~~~"])
def test_a_code_block_in_a_list_or_a_quotation_is_cut_into_code_blocks(
    before: str, first: str, further: str, after: str, mark: str
) -> None:
    """Each part is read alone: the code, and nothing else, is in code blocks, with the indent that it has."""
    code = [f"  line_{n}(*args, **more)" if n % 7 else "" for n in range(1, 80)]
    lines = [f"{first}{mark}py", *(further + line for line in code), further + mark]
    parts = split(before + "\n".join(lines) + after, 500)
    assert len(parts) > 3
    assert all(len(part) <= 500 for part in parts)
    parsed = [MarkdownIt("commonmark").parse(part) for part in parts]
    blocks = [token for tokens in parsed for token in tokens if token.type in ("fence", "code_block")]
    assert all(token.type == "fence" and token.info == "py" for token in blocks)
    assert [line for token in blocks for line in token.content.split("\n") if line] == [line for line in code if line]
    inline = [[token.content for token in tokens if token.type == "inline"] for tokens in parsed]
    assert not any("line_" in text or mark in text for texts in inline for text in texts)
    assert inline[-1] == re.findall(r"So it is\.|Done\.", after)


def test_a_code_block_that_ends_before_the_cut_is_not_open_there() -> None:
    block = "```\n" + "code\n" * 80 + "```"
    words = "word " * 99 + "word"
    assert split(f"{block}\n{words}", 500) == [block, words]
    # It ends with the quotation.
    assert split(f"> ```\n> code\n\n{words} {words}", 500)[1].startswith("word")


def test_a_late_code_block_and_a_table_in_a_list_begin_the_next_part_without_the_list() -> None:
    text = "1. " + "word " * 60 + "\n\n    ```\n" + "    code\n" * 40 + "    ```"
    assert split(text, 500)[1].startswith("```\ncode\ncode")
    rows = [f"| {n} | {'x' * 30} |" for n in range(40)]
    table = "\n".join(f"    {row}" for row in ("| a | b |", "|---|---|", *rows))
    parts = split(f"10. See:\n\n{table}", 500)
    assert all(part.startswith("| a | b |\n|---|---|\n| ") for part in parts[1:])
    assert all(row in "\n".join(parts) for row in rows)
    quoted = split("> | a | b |\n> |---|---|\n" + "\n".join(f"> {row}" for row in rows), 500)
    assert all(part.startswith("> | a | b |\n> |---|---|\n> | ") for part in quoted)


@pytest.mark.parametrize("character", ["a", "é", "报", "😀", "👨\u200d👩\u200d👧", "🇩🇪", "👍🏽", "e\u0301"])
def test_there_are_no_more_parts_than_needed_in_any_script(character: str) -> None:
    text = character * (20_000 // len(character))
    parts = split(text, 2_048, utf8_length)
    assert "".join(parts) == text
    assert all(len(part) % len(character) == 0 for part in parts)
    assert all(utf8_length(part) > 1_900 for part in parts[:-1])


def test_a_long_text_is_measured_only_a_few_times() -> None:
    """To measure may be to render. If each part measured the whole rest, a reply would stop the service for minutes."""
    measured = 0

    def rendered_length(text: str) -> int:
        nonlocal measured
        measured += len(text)
        return len(text)

    text = "![a" * 100_000
    assert "".join(split(text, 1_000, rendered_length)) == text
    assert measured < 3 * len(text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text", ["`" * 20_000, "`a``" * 2_000, f"```{'i' * 5_000}\n{'x' * 5_000}", f"~~~{'~' * 5_000}\na"]
)
@pytest.mark.parametrize("name", VENDORS)
def test_a_fence_that_fills_a_part_is_text(name: str, text: str) -> None:
    """To open and close it again in each part would never end, and fill the memory."""
    parts = VENDORS[name].split(text)
    assert sum(map(len, parts)) < 8 * len(text)
