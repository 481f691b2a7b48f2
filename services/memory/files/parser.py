"""Runs the parser of files in a process of its own, which can be killed. `parsing` is the program of that process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated

import msgspec

import infra
from infra.observe.logs import get_logger
from infra.security import confinement
from services.memory.domain import Chunk

PARSE_SECONDS = 600.0
# A hundred megabytes of text, with overlaps and headings, are less.
MAX_PARSED_BYTES = 512 * 1024**2
# Of a small file less: it can name one page, or one comment, a million times. Real files have ten times their size.
MIN_PARSED_BYTES, MAX_EXPANSION = 8 * 1024**2, 100
# A parser without output is stopped within this time after its document was deleted.
CHECK_SECONDS = 2.0
# The passages of one batch.
BATCH = 500
_ROOT = Path(infra.__file__).parent.parent
_log = get_logger("memory.parser")


class DocumentRefused(Exception):
    """The document cannot be indexed. The message is written for the person who uploaded it."""


class _ParserDied(Exception):
    """The parser process ended before the end of the document."""


@dataclass
class Findings:
    """The remarks of the parser about a document, complete after its last passage."""

    pages: int | None = None
    pages_without_text: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


Check = Callable[[], Awaitable[None]]
"""Raises NotFound if the document was deleted meanwhile."""


async def parsed(file: IO[bytes], type_: str, findings: Findings, check: Check) -> AsyncGenerator[list[Chunk], None]:
    """The file's passages in batches. Fills `findings`. Raises DocumentRefused and NotFound."""
    for is_last in (False, True):
        given = False
        try:
            async with aclosing(_parsed_once(file, type_, findings, check)) as parts:
                async for chunks in parts:
                    yield chunks
                    given = True
            return
        except _ParserDied:
            # A process can die for reasons other than its file. A second death is blamed on the file.
            if is_last or given:
                raise DocumentRefused("The file cannot be read: the parser crashes on it.") from None


async def _parsed_once(
    file: IO[bytes], type_: str, findings: Findings, check: Check
) -> AsyncGenerator[list[Chunk], None]:
    """The file's passages from one parser process. Raises DocumentRefused, _ParserDied and NotFound."""
    # A parser that a file has taken over must not find the service's secrets in its memory.
    confinement.hide_memory()
    file.seek(0)
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.memory.files.parsing",
            type_,
            str(os.getpid()),
            stdin=file,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            cwd=_ROOT,
            # Without the service's variables, for the same reason.
            env={"PYTHONUTF8": "1"},
            limit=2**22,
        )
        chunks: list[Chunk] = []
        complete = False
        try:
            size = os.fstat(file.fileno()).st_size
            most = min(MAX_PARSED_BYTES, MIN_PARSED_BYTES + MAX_EXPANSION * size)
            async with aclosing(_lines(process, check, most)) as lines:
                async for line in lines:
                    said = _understood(line)
                    if said.error is not None:
                        raise DocumentRefused(said.error)
                    if said.unconfined:
                        _log.warning("parser process is not fully confined", missing=said.unconfined)
                    if said.text is not None:
                        chunks.append(Chunk(said.text, said.section, said.page, said.tokens))
                    if complete := said.chunks is not None:
                        findings.pages = said.pages
                        findings.pages_without_text = said.pages_without_text
                        findings.warnings = said.warnings
                    if len(chunks) == BATCH:
                        yield chunks
                        chunks = []
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            # asyncio waits for the end of the output, too, and it may have stopped to read it because there was much.
            while process.stdout and await process.stdout.read(2**16):
                pass
            await process.wait()
        if not complete:
            if process.returncode == -signal.SIGXCPU:
                raise DocumentRefused(
                    f"The file could not be read within {confinement.MAX_CPU_SECONDS} s of processor time."
                )
            errors.seek(0)
            output = errors.read()[-2000:].decode(errors="replace")
            _log.error("parser process died", code=process.returncode, output=output)
            raise _ParserDied
        yield chunks


# PostgreSQL holds no NUL, and numbers of 32 bits. A passage has a few thousand characters.
_Line = Annotated[str, msgspec.Meta(max_length=100_000, pattern="^[^\\x00]*$")]
_Warning = Annotated[str, msgspec.Meta(max_length=2_000, pattern="^[^\\x00]*$")]
_Number = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Said(msgspec.Struct):
    """A line of the parser; `parsing` has their forms."""

    error: _Line | None = None
    unconfined: list[_Line] = []
    text: _Line | None = None
    section: _Line | None = None
    page: _Number | None = None
    tokens: _Number = 0
    chunks: _Number | None = None
    pages: _Number | None = None
    # A list of documents shows these for each. `parsing` writes no more of them.
    pages_without_text: Annotated[list[_Number], msgspec.Meta(max_length=10_000)] = []
    warnings: Annotated[list[_Warning], msgspec.Meta(max_length=101)] = []


def _understood(line: bytes) -> _Said:
    try:
        return msgspec.json.decode(line, type=_Said)
    except (ValueError, RecursionError):
        # Only a parser that its file has taken over says something else.
        raise DocumentRefused("The file cannot be read.") from None


async def _lines(process: asyncio.subprocess.Process, check: Check, most: int) -> AsyncGenerator[bytes, None]:
    """The lines of a parser process. Raises NotFound. Raises DocumentRefused after PARSE_SECONDS of waiting, also
    for a parser that sleeps between its lines, and after `most` bytes."""
    assert process.stdout is not None
    waited, size = 0.0, 0
    while True:
        began = time.monotonic()
        reading = asyncio.ensure_future(process.stdout.readline())
        try:
            while True:
                done, _ = await asyncio.wait({reading}, timeout=CHECK_SECONDS)
                if waited + time.monotonic() - began > PARSE_SECONDS:
                    raise DocumentRefused(f"The file could not be read within {PARSE_SECONDS / 60:g} minutes.")
                if done:
                    break
                await check()
        finally:
            reading.cancel()
            await asyncio.wait({reading})
        waited += time.monotonic() - began
        try:
            line = reading.result()
        except ValueError:
            raise DocumentRefused("The file cannot be read: a part of it is too large.") from None
        size += len(line)
        if size > most:
            raise DocumentRefused(f"The file has more than {most // 1024**2} MiB of text, too much for its size.")
        if not line:
            return
        yield line
