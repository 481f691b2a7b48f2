"""Reads a file that a person sent in a chat. Nothing of it is kept."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from contextlib import aclosing
from typing import NamedTuple

from infra.outgoing.shares import Shares
from infra.stores.objects import Objects
from services.memory.domain import Chunk
from services.memory.files.parser import DocumentRefused, Findings, parsed

# A person waits for the answer.
READ_SECONDS = 45.0
# A passage repeats at most about so many characters of the one before.
_OVERLAP = 400
_SHORTEST = 10


class Text(NamedTuple):
    text: str
    is_cut: bool = False
    refused: str = ""
    """Why there is no text, for the person."""
    warnings: tuple[str, ...] = ()


class FileReader:
    """Reads one file at a time, in turns by tenant: a parser may need 768 MB, and indexing has up to three of them
    beside."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._places = Shares(1)

    async def read(self, tenant_id: str, path: str, type_: str, most: int) -> Text:
        """At most `most` characters of the object at `path`. Raises NotFound, and Transient if the store is away."""
        async with self._places.place(tenant_id), self._objects.fetch(path) as stored:
            # Without a name: only the parser that gets the open file can read it.
            with tempfile.TemporaryFile() as file:
                await asyncio.to_thread(shutil.copyfileobj, stored, file)
                file.flush()
                findings = Findings()
                text, is_cut = "", False
                last: Chunk | None = None
                try:
                    async with (
                        asyncio.timeout(READ_SECONDS),
                        aclosing(parsed(file, type_, findings, _nothing)) as batches,
                    ):
                        async for chunks in batches:
                            for chunk in chunks:
                                text += _appended(last, chunk)
                                last = chunk
                            if is_cut := len(text) > most:
                                break
                except DocumentRefused as error:
                    return Text("", refused=str(error))
                except TimeoutError:
                    return Text("", refused=f"The file could not be read within {READ_SECONDS:g} s.")
        return Text(text[:most], is_cut, warnings=tuple(findings.warnings))


async def _nothing() -> None:
    """The file is not deleted meanwhile, so there is nothing to check."""


def _appended(last: Chunk | None, chunk: Chunk) -> str:
    """The passage after `last` without its repeated beginning, below its page or section if that is new."""
    if last is None or (chunk.page, chunk.section) != (last.page, last.section):
        place = f"[Page {chunk.page}]\n" if chunk.page else f"[{chunk.section}]\n" if chunk.section else ""
        return ("\n\n" if last else "") + place + chunk.text
    for size in range(min(_OVERLAP, len(last.text), len(chunk.text)), _SHORTEST, -1):
        if last.text.endswith(chunk.text[:size]):
            return chunk.text[size:]
    return "\n" + chunk.text
