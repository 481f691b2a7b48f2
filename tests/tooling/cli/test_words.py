"""Tests of the search for phrases that are hard to read."""

from __future__ import annotations

import pytest

from tooling.cli.words import PHRASES, stumbles

# One example of each phrase, in the order of the list. They are strings, which the check does not read in tests.
EXAMPLES = (
    "raises where it is empty",
    "prints what was found",
    "stops whoever called",
    "nobody waits for it",
    "builds it anew",
    "the run of which it is a part",
    "the names are none that a list gave",
    "this is no number",
    "it waits for ever",
    "the message comes again",
    "the message is set aside",
    "the incarnation of a topic",
    "the upkeep of tables",
    "lanes change hands too fast",
    "called so that it is no JSON",
    "waits for somebody",
    "built afresh",
    "without a sign of life",
    "the person and her words",
    "the row in place of which it stands",
    "it is stored all the same",
    "the standard has it that",
    "the key lies in a file of its own",
    "enough memory suffices for it",
    "a nought at the end",
    "whilst it runs",
    "reads and thereby copies",
    "slow, hence the limit",
    "waits in vain",
    "depends upon it",
    "ordered, lest two deadlock",
)


@pytest.mark.parametrize(("pattern", "example"), list(zip(PHRASES, EXAMPLES, strict=True)))
def test_each_phrase_of_the_list_is_found_with_its_advice(pattern: str, example: str) -> None:
    found = stumbles({"a.py": f"# {example}\n"})
    assert any(line.startswith("a.py:1: ") and line.endswith(f"write {PHRASES[pattern]}") for line in found), found


@pytest.mark.parametrize(
    ("path", "content", "lines"),
    [
        ("services/a.py", '"""Stops\n\nif nobody waits."""\n', [3]),
        ("services/a.py", "x = 1\n# Stops if\n# nobody waits.\n", [3]),
        ("services/a.py", "x = 1  # nobody waits\n", [1]),
        ("services/a.py", 'log.info("nobody waits")\n', [1]),
        ("services/a.py", "log.info(f'{name}: nobody waits')\n", [1]),
        ("services/a.py", 'x = """\nSELECT 1\n-- nobody waits\n"""\n', [3]),
        ("services/a.py", "def f():\n    '''Waits if no\n    one does. Nobody knows.'''\n", [3]),
        ("README.md", "# Title\n\nNobody waits.\n", [3]),
        ("claw", "# Nobody waits.\n", [1]),
        ("infra/a.sql", "-- nobody waits\n", [1]),
        (".github/workflows/ci.yml", "# nobody waits\n", [1]),
        ("tests/test_a.py", "# nobody waits\n", [1]),
        ("tests/test_a.py", 'def test():\n    """Nobody waits."""\n', [2]),
    ],
)
def test_a_phrase_is_found_in_every_kind_of_text(path: str, content: str, lines: list[int]) -> None:
    assert [line.split(": ")[0] for line in stumbles({path: content})] == [f"{path}:{line}" for line in lines]


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("services/a.py", "nobody = 1\nwhere = nobody\n"),
        ("services/a.py", "# The tool says where to look and what to do. There is no more. See what happens.\n"),
        ("tests/test_a.py", 'assert "nobody waits" in text\n'),
        ("tests/golden/a.json", "nobody waits\n"),
        ("services/a/a_pb2.py", "# nobody waits\n"),
        ("requirements.txt", "# nobody waits\n"),
        ("picture.svg", "nobody waits\n"),
    ],
)
def test_names_data_and_generated_files_are_not_texts(path: str, content: str) -> None:
    assert stumbles({path: content}) == []


def test_a_sentence_that_breaks_inside_a_phrase_is_found_on_its_first_line() -> None:
    [found] = stumbles({"a.md.py": '"""The runs of\nwhich it waits."""\n'})
    assert found.startswith("a.md.py:1: “The runs of which")
