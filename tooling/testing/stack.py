"""A private stack of real engines for tests and benches, with its own state folder and free ports, removed at the end.

``python -m tooling.testing.stack`` keeps one running in the foreground and prints the value for CLAW_TEST_STACK. Test
runs with this variable use that stack and start none of their own, so several developers can share one.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import usual_ports
from tooling.stack.ports import is_free
from tooling.stack.supervisor import Supervisor

DEFAULT_ENGINES = ("postgres", "valkey", "kafka", "rabbitmq")


class Stack:
    """A running stack: administrators' access to each engine, and methods that kill, pause and stop it.

    Engine names are those of ``./claw status``. Each method that changes an engine acts on its whole process tree.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.engines: dict[str, dict[str, Any]] = {}
        self._needed: set[str] = set()
        self._read_credentials()
        self._supervisor = Supervisor(home)

    def _read_credentials(self) -> None:
        self.engines = json.loads((self.home / "credentials.json").read_text())["engines"]

    def need(self, *names: str) -> None:
        """Starts these engines, unless an earlier call did: the command takes seconds, and every module calls this."""
        if not self._needed.issuperset(names):
            run_claw(self.home, "up", "--only", ",".join(names))
            self._read_credentials()
            self._needed.update(names)

    @property
    def postgres_url(self) -> str:
        """The administrator's URL of the database that `up` makes. Tests use the fixture `database` instead."""
        return str(self.engines["postgres"]["url"])

    @property
    def redis_url(self) -> str:
        return str(self.engines["redis"]["url"])

    @property
    def kafka_bootstrap_servers(self) -> str:
        return str(self.engines["kafka"]["bootstrap_servers"])

    @property
    def rabbitmq_url(self) -> str:
        """The administrator's URL of the default virtual host. Tests use the fixture `vhost` instead."""
        return str(self.engines["rabbitmq"]["url"])

    @property
    def rabbitmq_management_url(self) -> str:
        """The URL of the management API, with user and password."""
        return str(self.engines["rabbitmq"]["management_url"])

    def pid(self, name: str) -> int:
        """Process id of the program that the supervisor started, 0 if it is down."""
        return self._supervisor.processes()[name].pid

    def pids(self) -> dict[str, int]:
        """Process ids of all running programs of the stack by name."""
        return {name: process.pid for name, process in self._supervisor.processes().items() if process.pid}

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends the signal to the engine and all of its children. The supervisor restarts a killed engine."""
        for process in self._tree(name):
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue

    def pause(self, name: str) -> None:
        """Sends SIGSTOP: its ports accept connections and nothing answers. `cont` ends it."""
        self.kill(name, signal.SIGSTOP)

    def cont(self, name: str) -> None:
        self.kill(name, signal.SIGCONT)

    def stop(self, name: str) -> None:
        """Stops the engine properly. It stays down until `start`."""
        self._supervisor.stop(name)

    def start(self, name: str) -> None:
        """Starts a stopped engine and waits until it works."""
        run_claw(self.home, "up", "--only", name)

    def restart(self, name: str) -> None:
        self.stop(name)
        self.start(name)

    def wait_ready(self, name: str) -> None:
        """Waits until the engine answers its clients again, for at most five minutes."""
        self.start(name)

    def _tree(self, name: str) -> list[psutil.Process]:
        try:
            process = psutil.Process(self.pid(name))
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextmanager
def running_stack(engines: Iterable[str] = DEFAULT_ENGINES) -> Iterator[Stack]:
    """Starts these engines for the block, or uses the stack that CLAW_TEST_STACK names."""
    if shared := os.environ.get("CLAW_TEST_STACK"):
        run_claw(Path(shared), "up", "--only", ",".join(engines))
        yield Stack(Path(shared))
        return
    with private_home() as home:
        run_claw(home, "up", "--only", ",".join(engines))
        yield Stack(home)


@contextmanager
def private_home() -> Iterator[Path]:
    """A state folder with free ports. A guard process ends everything that was started in it, at the end of the block
    and also if this process is killed."""
    # Directly under /tmp: the stack's own user may not be able to enter TMPDIR.
    folder = Path(tempfile.mkdtemp(prefix="claw-test-", dir="/tmp"))
    folder.chmod(0o755)
    home = folder / "stack"
    home.mkdir()
    (home / "ports.json").write_text(json.dumps(free_ports(list(usual_ports()))))
    guard = subprocess.Popen(
        [sys.executable, "-m", "tooling.testing.stack", "--guard", str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
        env=_environment(home),
    )
    try:
        yield home
    finally:
        guard.communicate()


def run_claw(home: Path, *arguments: str) -> str:
    """Runs a CLI command on this stack and returns its output. Raises RuntimeError with the output if it fails."""
    command = [sys.executable, "-m", "tooling.cli", *arguments]
    done = subprocess.run(command, env=_environment(home), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"./claw {' '.join(arguments)}, CLAW_HOME={home}:\n{done.stdout}{done.stderr}")
    return done.stdout


def free_ports(names: Sequence[str]) -> dict[str, int]:
    """A block of free ports below those that the system gives to outgoing connections.

    They belong to this process until it ends. Otherwise two processes that start stacks at the same time would get
    the same ports, as long as no program listens on them.
    """
    while True:
        first = random.randrange(12_000, 31_000)
        ports = range(first, first + len(names))
        if _claim(first, len(names)) and all(is_free(port) for port in ports):
            return dict(zip(names, ports, strict=True))


def free_port() -> int:
    [port] = free_ports([""]).values()
    return port


def _claim(first: int, count: int) -> bool:
    """Locks bytes `first` to `first + count` of a file that all of this user's processes share. False if one of them
    is locked. The system removes the locks of a process that ends."""
    file, mine = _claims()
    ports = set(range(first, first + count))
    if mine & ports:  # The system gives a process its own locks again.
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
    except BlockingIOError:
        return False
    mine.update(ports)
    return True


@cache
def _claims() -> tuple[int, set[int]]:
    """The file of the claims, and this process's ports. It stays open: closing it would remove all locks."""
    return os.open(f"/tmp/claw-test-ports-{os.getuid()}", os.O_RDWR | os.O_CREAT, 0o600), set()


def _environment(home: Path) -> dict[str, str]:
    environment = {**os.environ, "CLAW_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    environment.pop("CLAW_PORT_OFFSET", None)
    return environment


def _guard(folder: Path) -> None:
    """Ends the stack after the end of standard input: the parent has closed it or has died."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    run_claw(folder / "stack", "down", "--wipe")
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _serve() -> None:
    with running_stack() as stack:
        print(f"CLAW_TEST_STACK={stack.home}", flush=True)  # noqa: T201
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    _guard(Path(sys.argv[2])) if "--guard" in sys.argv else _serve()
