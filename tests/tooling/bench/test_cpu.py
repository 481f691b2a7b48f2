"""CPU time of a process tree, also of children that have ended."""

from __future__ import annotations

import asyncio
import sys

import psutil
import pytest

from tooling.bench import cpu

# Uses about 0.3 s of CPU in a child that ends, then waits for a line.
_PROGRAM = """
import subprocess, sys
burn = "import time\\nwhile time.process_time() < 0.3: pass"
subprocess.run([sys.executable, "-c", burn], check=True)
print("ready", flush=True)
sys.stdin.readline()
"""


async def test_the_time_of_an_ended_child_counts() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PROGRAM, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    used = cpu.seconds(process.pid)
    own = psutil.Process(process.pid).cpu_times()
    # The system counts in hundredths of a second, and rounds down.
    assert used >= 0.2
    assert used > own.user + own.system
    await process.communicate(b"\n")
    assert cpu.seconds(process.pid) == 0


def test_a_process_that_was_restarted_counts_from_its_start() -> None:
    before, after = {"agent": 5.0, "channel": 1.0}, {"agent": 0.5, "channel": 3.0, "billing": 2.0}
    assert cpu.difference(before, after) == {"agent": 0, "channel": 2, "billing": 2}
    assert sum(cpu.difference(before, after).values()) == pytest.approx(4)
