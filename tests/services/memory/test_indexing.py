"""The parser process may die because of its file or for another reason."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from services.memory import indexing
from services.memory.domain import Chunk

CHUNK = Chunk("text", None, None, 1)


async def parts(monkeypatch: pytest.MonkeyPatch, *deaths: int | None) -> tuple[list[Chunk], int]:
    """The passages read, and the number of processes, if the processes die one after the other after so many parts."""
    begun = 0

    async def once(path: str, type_: str) -> AsyncGenerator[list[Chunk], None]:
        nonlocal begun
        death = deaths[begun]
        begun += 1
        for n in range(2):
            if n == death:
                raise indexing._ParserDied
            yield [CHUNK]

    monkeypatch.setattr(indexing, "_parsed_once", once)
    found = [chunk async for some in indexing._parsed("path", "text/plain") for chunk in some]
    return found, begun


async def test_a_parser_that_died_of_something_else_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await parts(monkeypatch, 0, None) == ([CHUNK, CHUNK], 2)
    assert await parts(monkeypatch, None) == ([CHUNK, CHUNK], 1)


@pytest.mark.parametrize("deaths", [(0, 0), (1,)])
async def test_one_that_dies_again_or_half_way_refuses_the_file(
    monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...]
) -> None:
    with pytest.raises(indexing._Refused, match="parser crashes"):
        await parts(monkeypatch, *deaths)
