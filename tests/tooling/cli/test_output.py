"""Progress of a long command on stderr: one live line on a terminal, elsewhere a line from time to time."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from tooling.stack.checkout import CHECKOUT

# The command ends when its own line has come through the pipe or the terminal.
_COMMAND = """
import sys
from tooling.cli import output
output._SECONDS_OF_A_LINE = 0.01
with output.Progress() as progress:
    progress.count("records of a topic", 3_000, 12_000)
    progress.add("a part [of] it", 1_500_000)
    progress.add("a part [of] it", 1_000_000)
    sys.stdin.readline()
"""


def _start(stderr: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND],
        cwd=CHECKOUT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
        stdin=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def test_without_a_terminal_there_are_plain_lines() -> None:
    with _start(subprocess.PIPE) as command:
        assert command.stderr
        assert command.stdin
        line = command.stderr.readline()
        while "a part" not in line:
            line = command.stderr.readline()
        command.stdin.close()
        command.stderr.read()
    assert re.fullmatch(r"after \d+ s: a part \[of\] it: 2\.5 MB\n", line)
    assert command.returncode == 0


def test_on_a_terminal_there_is_one_live_line() -> None:
    ours, theirs = pty.openpty()
    try:
        with _start(theirs) as command:
            os.close(theirs)
            seen = b""
            while b"a part [of] it: 2.5 MB" not in seen:
                seen += os.read(ours, 4096)
            assert command.stdin
            command.stdin.close()
        assert b"\n" not in seen
    finally:
        os.close(ours)
    assert command.returncode == 0
