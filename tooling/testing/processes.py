"""Service processes for tests. They are forks of a process that has imported all code, so a start does not wait for
imports."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tooling.stack.home import SERVICES

_LOADED = (
    *(f"services.{name}.__main__" for name in SERVICES),
    *(f"tooling.testing.sample.{name}.__main__" for name in ("front", "desk", "ledger", "courier")),
    "tooling.testing.preload",
)
# From <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_LOADED))
    return context


class Process:
    """A running service with the methods of a `subprocess.Popen`.

    `module`: the package whose ``__main__`` defines `service`. `environment`: all variables of the process. `log`: the
    file to which its output is appended.
    """

    def __init__(self, module: str, environment: Mapping[str, str], log: Path) -> None:
        log.touch()
        # A daemon: if its owner forgets it, it ends with the tests.
        self._process = _server().Process(target=_run, args=(module, dict(environment), log), daemon=True)
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code (negative for a signal), or None while the process runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Waits for the end and returns the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(seconds)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self._process.name, seconds or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(module: str, environment: dict[str, str], log: Path) -> None:
    # Ctrl-C reaches the test run only, which then stops its services with SIGTERM.
    os.setsid()
    if sys.platform == "linux":
        # A killed test run ends the fork server, and that ends this process; otherwise it would run forever. The fork
        # server ends when the last writer of its pipe has ended, so this process must not be one.
        os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    importlib.import_module(f"{module}.__main__").service.run()
