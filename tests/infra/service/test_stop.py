"""A process that does not stop by itself is ended and logs its open tasks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tooling.stack.checkout import CHECKOUT

# A service whose only part never stops, as a library that waits for an engine that is gone.
SERVICE = """
import asyncio, os, signal, time
from infra.service import process
from infra.service import service as kernel

class Stuck(kernel.Service):
    async def _start(self, settings, stack, running):
        async def never():
            asyncio.current_task().set_name("the stuck part")
            {wait}
        stack.push_async_callback(never)
        os.kill(os.getpid(), signal.SIGTERM)

process.STOP_SECONDS = 1.0
asyncio.run(Stuck("stuck", kernel.Settings).serve(None))
"""


@pytest.mark.parametrize("wait", ["await asyncio.Event().wait()", "time.sleep(600)"])
def test_a_process_whose_part_does_not_stop_is_ended(tmp_path: Path, wait: str) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(SERVICE.format(wait=wait))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    # The stack of each thread.
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in _run_once" in done.stderr or "in never" in done.stderr
    if wait.startswith("await"):
        assert "the stuck part" in done.stdout + done.stderr
