"""Tests of a server in a network namespace of its own: reachable through one port of loopback, and ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tooling.stack import isolated
from tooling.stack.checkout import CHECKOUT
from tooling.stack.ports import is_free
from tooling.testing.stack import free_ports

CONTENT = "x" * 200_000
POSSIBLE = "import tooling.stack.isolated as i, sys; sys.exit(not i.is_possible())"


def machine_allows_namespaces() -> bool:
    command = [sys.executable, "-c", POSSIBLE]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=False).returncode == 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """An HTTP server that listens on every interface, and its port."""
    (tmp_path / "file").write_text(CONTENT)
    port = free_ports(["http"])["http"]
    serve = (sys.executable, "-m", "http.server", str(port), "--directory", str(tmp_path))
    command = [sys.executable, "-m", "tooling.stack.isolated", str(port), "no TLS", *serve]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, stderr=subprocess.DEVNULL)
    until(lambda: answers("127.0.0.1", port))
    yield process, port
    process.kill()
    process.wait()


def answers(host: str, port: int) -> bool:
    try:
        return httpx.get(f"http://{host}:{port}/file", trust_env=False, timeout=60).text == CONTENT
    except httpx.TransportError:
        return False


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in 60 s"
        time.sleep(0.05)


def test_only_the_forwarded_port_of_loopback_is_reachable(server: tuple[subprocess.Popen[bytes], int]) -> None:
    process, port = server
    if not machine_allows_namespaces():
        assert not isolated.is_isolated(process.pid)
        return
    assert isolated.is_isolated(process.pid)
    assert answers("127.0.0.1", port)
    # The server listens there too, but in its own namespace.
    assert not answers("127.0.0.2", port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_ends_with_its_forwarder(
    server: tuple[subprocess.Popen[bytes], int], number: signal.Signals
) -> None:
    process, _ = server
    children = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_the_exit_code_is_the_servers() -> None:
    port = free_ports(["http"])["http"]
    command = [sys.executable, "-m", "tooling.stack.isolated", str(port), "no TLS", sys.executable, "-c", "exit(7)"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, check=False)
    assert done.returncode == 7


def test_without_namespaces_the_server_runs_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class InPlace(Exception):
        """Stands for the process that the command replaces."""

    def replace(name: str, command: list[str]) -> None:
        raise InPlace(name, command)

    monkeypatch.setattr(isolated, "is_possible", lambda: False)
    monkeypatch.setattr(os, "execvp", replace)
    port = free_ports(["http"])["http"]
    with pytest.raises(InPlace) as replaced:
        isolated.main(port, tmp_path / "none", ["server", "argument"])
    assert replaced.value.args == ("server", ["server", "argument"])
    assert is_free(port)


def test_without_namespaces_there_is_no_tls_whose_server_has_an_open_port(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(isolated, "is_possible", lambda: False)
    monkeypatch.setattr(isolated, "server_context", lambda _: object())
    port = free_ports(["http"])["http"]
    assert isolated.main(port, tmp_path, ["server"]) == 1
    assert is_free(port)
