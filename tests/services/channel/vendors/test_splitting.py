"""Splitting long texts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
