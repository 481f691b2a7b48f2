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
from typing import IO

import msgspec

import infra
from infra.observe.logs import get_logger
from services.memory import confinement
from services.memory.domain import Chunk

PARSE_SECONDS = 600.0
# A parser without output is stopped within this time after its document was deleted.
CHECK_SECONDS = 2.0
# The passages of one batch.
BATCH = 500
_ROOT = Path(infra.__file__).parent.parent
_log = get_logger("memory.parser")


class Refused(Exception):
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
    """The file's passages in batches. Fills `findings`. Raises Refused and NotFound."""
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
                raise Refused("The file cannot be read: the parser crashes on it.") from None


async def _parsed_once(
    file: IO[bytes], type_: str, findings: Findings, check: Check
) -> AsyncGenerator[list[Chunk], None]:
    """The file's passages from one parser process. Raises Refused, _ParserDied and NotFound."""
    # A parser that a file has taken over must not find the service's secrets in its memory.
    confinement.hide_memory()
    file.seek(0)
    with tempfile.TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.memory.parsing",
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
            async with aclosing(_lines(process, check)) as lines:
                async for line in lines:
                    said = msgspec.json.decode(line)
                    if "error" in said:
                        raise Refused(said["error"])
                    if "unconfined" in said:
                        _log.warning("parser process is not fully confined", missing=said["unconfined"])
                    if "text" in said:
                        chunks.append(Chunk(**said))
                    if complete := "chunks" in said:
                        findings.pages = said["pages"]
                        findings.pages_without_text = said["pages_without_text"]
                        findings.warnings = said["warnings"]
                    if len(chunks) == BATCH:
                        yield chunks
                        chunks = []
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if not complete:
            if process.returncode == -signal.SIGXCPU:
                raise Refused(f"The file could not be read within {confinement.MAX_CPU_SECONDS} s of processor time.")
            errors.seek(0)
            output = errors.read()[-2000:].decode(errors="replace")
            _log.error("parser process died", code=process.returncode, output=output)
            raise _ParserDied
        yield chunks


async def _lines(process: asyncio.subprocess.Process, check: Check) -> AsyncGenerator[bytes, None]:
    """The lines of a parser process. Raises Refused after PARSE_SECONDS, and NotFound."""
    assert process.stdout is not None
    deadline = time.monotonic() + PARSE_SECONDS
    while True:
        reading = asyncio.ensure_future(process.stdout.readline())
        try:
            while not (await asyncio.wait({reading}, timeout=CHECK_SECONDS))[0]:
                if time.monotonic() > deadline:
                    raise Refused(f"The file could not be read within {PARSE_SECONDS / 60:g} minutes.")
                await check()
        finally:
            reading.cancel()
        if not (line := reading.result()):
            return
        yield line
