"""The parser process may die because of its file or for another reason."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

from infra.errors import NotFound
from infra.security import confinement
from infra.stores import filetypes as types
from services.memory.domain import Chunk
from services.memory.files import parser, parsing
from services.memory.files.parser import Findings
from tests.services.memory import files
from tooling.stack.checkout import CHECKOUT

CHUNK = Chunk("text", None, None, 1)


async def never_deleted() -> None:
    pass


def stored(content: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    file.flush()
    return file


async def parts(monkeypatch: pytest.MonkeyPatch, *deaths: int | None) -> tuple[list[Chunk], int]:
    """The passages read, and the number of processes, if the processes die one after the other after so many parts."""
    begun = 0

    async def once(*_: Any) -> AsyncGenerator[list[Chunk], None]:
        nonlocal begun
        death = deaths[begun]
        begun += 1
        for n in range(2):
            if n == death:
                raise parser._ParserDied
            yield [CHUNK]

    monkeypatch.setattr(parser, "_parsed_once", once)
    read = parser.parsed(io.BytesIO(), types.TEXT, Findings(), never_deleted)
    found = [chunk async for some in read for chunk in some]
    return found, begun


async def test_a_parser_that_died_of_something_else_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await parts(monkeypatch, 0, None) == ([CHUNK, CHUNK], 2)
    assert await parts(monkeypatch, None) == ([CHUNK, CHUNK], 1)


@pytest.mark.parametrize("deaths", [(0, 0), (1,)])
async def test_one_that_dies_again_or_half_way_refuses_the_file(
    monkeypatch: pytest.MonkeyPatch, deaths: tuple[int, ...]
) -> None:
    with pytest.raises(parser.DocumentRefused, match="parser crashes"):
        await parts(monkeypatch, *deaths)


# Reads a pipe that stays open: a parser that never ends.
@pytest.fixture
def endless() -> Iterator[IO[bytes]]:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file:
        file.seek = lambda *_: 0  # type: ignore[method-assign]
        yield file
    os.close(write)


async def test_a_parser_is_stopped_when_its_document_is_deleted(
    endless: IO[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, "CHECK_SECONDS", 0.05)

    async def deleted() -> None:
        raise NotFound("document")

    with pytest.raises(NotFound):
        async for _ in parser.parsed(endless, types.TEXT, Findings(), deleted):
            pass
    assert not children()


async def test_a_parser_is_stopped_when_its_time_is_over(endless: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(parser, "PARSE_SECONDS", 0.1)
    with pytest.raises(parser.DocumentRefused, match="within 0"):
        async for _ in parser.parsed(endless, types.TEXT, Findings(), never_deleted):
            pass
    assert not children()


def children() -> list[str]:
    """The parser processes of this process."""
    return [
        line
        for line in subprocess.run(
            ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True
        ).stdout.splitlines()
        if "services.memory.files.parsing" in line
    ]


async def test_the_findings_of_the_parser_arrive() -> None:
    findings = Findings()
    with stored(files.pdf(["First.", "", "Third."])) as file:
        found = [chunk async for some in parser.parsed(file, types.PDF, findings, never_deleted) for chunk in some]
    assert [(chunk.text, chunk.page) for chunk in found] == [("First.", 1), ("Third.", 3)]
    assert (findings.pages, findings.pages_without_text) == (3, [2])
    [warning] = findings.warnings
    assert warning.startswith("Pages without text: 2. ")


def test_so_many_pages_without_text_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "MAX_LISTED_PAGES", 2)
    with stored(files.pdf(["First.", "", "", ""])) as file:
        *_, last = parsing.answer(file, types.PDF, None)
    assert (last["pages"], last["pages_without_text"]) == (4, [2, 3])


async def test_a_small_file_that_names_one_comment_many_times_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only after the 512 MiB that a large file may have: all of it would be embedded and stored before."""
    monkeypatch.setattr(parser, "MIN_PARSED_BYTES", 10_000)
    monkeypatch.setattr(parser, "MAX_EXPANSION", 10)
    comment = "<< /Type /Annot /Subtype /Text /Rect [0 0 1 1] /Contents (" + "the same words again " * 40 + ") >>"
    page = "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Annots [" + "4 0 R " * 1_000 + "] >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page, comment]
    with stored(files.assembled(objects)) as file, pytest.raises(parser.DocumentRefused, match="too much for its size"):
        async for _ in parser.parsed(file, types.PDF, Findings(), never_deleted):
            pass
    assert not children()


async def test_a_file_that_needs_too_much_processor_time_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ended:
        returncode = -signal.SIGXCPU
        stdout = None

        def kill(self) -> None:
            raise ProcessLookupError

        async def wait(self) -> None:
            pass

    starts = 0

    async def start(*_: Any, **__: Any) -> Ended:
        nonlocal starts
        starts += 1
        return Ended()

    async def no_lines(*_: Any) -> AsyncGenerator[bytes, None]:
        return
        yield b""

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(parser, "_lines", no_lines)
    with stored(b"x") as file, pytest.raises(parser.DocumentRefused, match="120 s of processor time"):
        async for _ in parser.parsed(file, types.TEXT, Findings(), never_deleted):
            pass
    assert starts == 1


def test_a_parser_ends_with_its_service(tmp_path: Path) -> None:
    """The service is a process that starts a parser and is killed. This process keeps the parser's file open."""
    program = (
        "import os, subprocess, sys, time\n"
        "command = [sys.executable, '-m', 'services.memory.files.parsing', 'text/plain', str(os.getpid())]\n"
        "parser = subprocess.Popen(command,"
        " stdin=int(sys.argv[1]), env={'PYTHONUTF8': '1'})\n"
        "print(parser.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    read, write = os.pipe()
    service = subprocess.Popen(
        [sys.executable, "-c", program, str(read)], cwd=CHECKOUT, stdout=subprocess.PIPE, pass_fds=[read]
    )
    assert service.stdout is not None
    pid = int(service.stdout.readline())
    try:
        # It has confined itself, and reads its file from now on.
        wait_until(lambda: seccomp(pid) == "2")
        service.kill()
        wait_until(lambda: state(pid) in "ZX")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        service.wait()
        service.stdout.close()
        os.close(read)
        os.close(write)


def seccomp(pid: int) -> str:
    return status(pid, "Seccomp")


def state(pid: int) -> str:
    return status(pid, "State")[:1]


def status(pid: int, name: str) -> str:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "X"
    return next((line.split(":")[1].strip() for line in lines if line.startswith(f"{name}:")), "")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


ATTEMPTS = """
import os, socket, sys
from infra.security import confinement
parent = os.getppid()
confinement.limit()
print(*confinement.confine(parent))
for attempt in (
    lambda: socket.socket(),
    lambda: os.execv("/bin/true", ["true"]),
    lambda: os.kill(parent, 0),
    lambda: open(f"/proc/{parent}/environ"),
    lambda: open(f"/proc/{parent}/mem"),
    lambda: open("/etc/hostname"),
    lambda: open("/tmp/a file of the parser", "w"),
    lambda: os.listdir("/"),
):
    try:
        attempt()
        print("allowed")
    except PermissionError:
        print("refused")
"""


def test_code_in_the_parser_gets_no_network_no_programs_and_no_files() -> None:
    done = subprocess.run([sys.executable, "-c", ATTEMPTS], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    missing, *answers = done.stdout.splitlines()
    if missing:
        pytest.skip(f"this machine does not allow: {missing}")
    assert answers == ["refused"] * 8


def test_memory_beyond_the_limit_is_refused() -> None:
    program = f"from infra.security import confinement as c; c.limit(); bytearray({confinement.MAX_MEMORY_BYTES})"
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
