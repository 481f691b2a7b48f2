"""Service processes of tests end with the test run, also if it is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import psutil

from tooling.stack.checkout import CHECKOUT

_RUN = """
import os, sys
from pathlib import Path
from tooling.testing import processes
processes._LOADED = ()
process = processes.Process("waiting", os.environ, Path(sys.argv[1]))
print(process.pid, flush=True)
sys.stdin.readline()
"""
_WAITING = """
import time
class service:
    def run():
        print("runs", flush=True)
        time.sleep(600)
"""


async def test_a_service_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "waiting").mkdir()
    (tmp_path / "waiting" / "__main__.py").write_text(_WAITING)
    log = tmp_path / "log"
    run = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _RUN,
        str(log),
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{CHECKOUT}"},
    )
    assert run.stdout is not None
    service = psutil.Process(int(await run.stdout.readline()))
    async with asyncio.timeout(60):
        while not log.read_text():
            await asyncio.sleep(0.05)
        assert service.is_running()
        run.send_signal(signal.SIGKILL)
        await run.wait()
        while service.is_running() and service.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.05)
