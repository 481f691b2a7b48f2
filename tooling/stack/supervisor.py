"""Keeps the processes of a stack running by supervisord: one per state folder, with a socket in that folder."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from supervisor.xmlrpc import SupervisorTransport

from tooling.stack.engines.base import EngineError, Program, write_atomically

# The environment of every process of a stack holds this variable, also if the process left the supervisor's tree.
MARK = "CLAW_STACK"
_STOP_SECONDS = 30


@dataclass(frozen=True)
class Process:
    """The state of a program."""

    state: str
    """As supervisord names it: RUNNING, STARTING, BACKOFF, FATAL, STOPPED or STOPPING."""
    pid: int
    """0 if the program does not run."""
    uptime_s: int
    restarts: int


class Supervisor:
    """The supervisor of the state folder `home`."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._socket = home / "supervisor.sock"
        # The system's limit for a socket's path is 108 bytes, on macOS 104.
        if len(str(self._socket).encode()) > 100:
            raise EngineError(
                f"CLAW_HOME: {home} is too long for the path of a socket: must have at most 80 characters"
            )

    def running(self) -> bool:
        try:
            self._call("getState")
        except (OSError, xmlrpc.client.Error):
            return False
        return True

    def start(self) -> None:
        """Starts the supervisor without programs. First ends all processes that a killed supervisor has left."""
        if self.running():
            return
        end_all(self._home)
        for old in (self._home / "programs").glob("*"):
            old.unlink()
        for name in ("log", "programs"):
            (self._home / name).mkdir(mode=0o700, exist_ok=True)
        write_atomically(
            self._home / "supervisord.conf",
            _section("unix_http_server", file=self._socket, chmod="0700")
            + _section(
                "supervisord",
                logfile=self._home / "log" / "supervisord.log",
                logfile_maxbytes="10MB",
                logfile_backups=2,
                pidfile=self._home / "supervisord.pid",
                directory=self._home,
                # Each start of a program closes this number of descriptors in a Python loop.
                minfds=min(_most_files(), 1024),
                umask="077",
            )
            + "[rpcinterface:supervisor]\n"
            + "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            + _section("include", files=self._home / "programs" / "*.conf"),
        )
        command = [sys.executable, "-m", "tooling.stack.supervisord", "-c", str(self._home / "supervisord.conf")]
        environment = {**os.environ, MARK: str(self._home)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        deadline = time.monotonic() + 10
        while not self.running():
            if done.returncode or time.monotonic() > deadline:
                raise EngineError(f"could not start supervisord: {(done.stderr or done.stdout).strip()}")
            time.sleep(0.05)

    def add(self, name: str, program: Program) -> None:
        """Starts the program and keeps it running. Does nothing if it runs already.

        A program that was stopped starts as it was started before.
        """
        if known := self.processes().get(name):
            if known.state not in ("RUNNING", "STARTING", "BACKOFF"):
                self._call("startProcess", name, False)
            return
        self._starts(name).unlink(missing_ok=True)
        script = self._write_script(name, program)
        (self._home / name).mkdir(mode=0o700, exist_ok=True)
        write_atomically(
            script.with_suffix(".conf"),
            _section(
                f"program:{name}",
                command=f"/bin/sh {shlex.quote(str(script))}",
                directory=self._home / name,
                autorestart="true",
                startsecs=1,
                startretries=20,
                stopsignal=program.stop_signal,
                stopwaitsecs=_STOP_SECONDS,
                killasgroup="true",
                redirect_stderr="true",
                stdout_logfile=self.log(name),
                stdout_logfile_maxbytes="10MB",
                stdout_logfile_backups=2,
            ),
        )
        self.load(name)

    def restart(self, name: str, program: Program) -> None:
        """Stops the program, and starts it with this command and environment."""
        self.stop(name)
        self._write_script(name, program)
        self._call("startProcess", name, False)

    def _write_script(self, name: str, program: Program) -> Path:
        path = self._home / "programs" / f"{name}.sh"
        exports = [f"export {key}={shlex.quote(value)}" for key, value in program.environment.items()]
        limit = f"ulimit -n {_most_files()}"
        noted = f"echo >>{shlex.quote(str(self._starts(name)))}"
        write_atomically(path, "\n".join([limit, *exports, noted, f"exec {shlex.join(program.command)}"]) + "\n")
        return path

    def load(self, name: str) -> None:
        """Starts the program whose files are in the folder of programs."""
        self._call("reloadConfig")
        self._call("addProcessGroup", name)

    def processes(self) -> dict[str, Process]:
        """All programs by name; empty if the supervisor does not run."""
        if not self.running():
            return {}
        return {
            info["name"]: Process(
                info["statename"],
                info["pid"],
                max(0, info["now"] - info["start"]) if info["pid"] else 0,
                self._restarts(info["name"]),
            )
            for info in self._call("getAllProcessInfo")
        }

    def stop(self, name: str) -> None:
        """Stops the program, waits for its end, and does not start it again."""
        self._call("stopProcess", name)

    def remove(self, name: str) -> None:
        """Stops the program, waits for its end, and forgets it with its folder, which must be empty, and its log."""
        self.stop(name)
        self._call("removeProcessGroup", name)
        for suffix in ("conf", "sh", "starts"):
            (self._home / "programs" / f"{name}.{suffix}").unlink()
        (self._home / name).rmdir()
        self.log(name).unlink()

    def shutdown(self, first: Sequence[str] = (), kill: bool = False) -> None:
        """Stops the programs `first`, then all others, then the supervisor. Returns when no process is left.

        With `kill` all processes are killed at once, in any order: only for a stack whose data is to be deleted.
        """
        if self.running():
            pid = self._call("getPID")
            if not kill:
                self._stop_together(first)
                # All at the same time: supervisord's own shutdown waits for one program after the other.
                self._call("stopAllProcesses")
            # It has no programs left, and its own shutdown would take two more seconds.
            psutil.Process(pid).kill()
            self._socket.unlink(missing_ok=True)
        end_all(self._home, kill)

    def _stop_together(self, names: Sequence[str]) -> None:
        running = [name for name, process in self.processes().items() if name in names and process.pid]
        for name in running:
            self._call("stopProcess", name, False)
        while any(self.processes()[name].pid for name in running):
            time.sleep(0.1)

    def log(self, name: str) -> Path:
        """The program's log file. It is rotated at 10 MB; three files are kept."""
        return self._home / "log" / f"{name}.log"

    def _restarts(self, name: str) -> int:
        starts = self._starts(name)
        return max(0, starts.stat().st_size - 1) if starts.exists() else 0

    def _starts(self, name: str) -> Path:
        """The file that has a line for each start of the program."""
        return self._home / "programs" / f"{name}.starts"

    def _call(self, method: str, *arguments: Any) -> Any:
        with contextlib.closing(SupervisorTransport(None, None, f"unix://{self._socket}")) as transport:
            proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)


def orphans(home: Path) -> list[psutil.Process]:
    """All processes of this stack, also if its supervisor does not run."""
    return [process for process in psutil.process_iter() if _belongs(process, home)]


def end_all(home: Path, kill: bool = False) -> None:
    """Ends every process of this stack.

    Searches again afterwards: a process such as nginx may have started another one just before its end.
    """
    for _ in range(5):
        if not (left := orphans(home)):
            return
        end_processes(left, kill)


def end_processes(processes: list[psutil.Process], kill: bool = False) -> None:
    """Ends the processes. Kills those that still run after ten seconds, or all at once with `kill`."""
    if not kill:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=0 if kill else 10)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=10)


def _belongs(process: psutil.Process, home: Path) -> bool:
    try:
        if process.pid == os.getpid():
            return False
        # Memory hides its environment from other processes of its user once it has read a document. So services have
        # the mark in their command line, too: otherwise a killed stack would leave memory running.
        if f"{MARK}={home}" in process.cmdline() or process.environ().get(MARK) == str(home):
            return True
        # These two overwrite their environment with their title. A folder alone is not enough: a shell may be in it.
        return process.name() in ("postgres", "nginx") and Path(process.cwd()).is_relative_to(home)
    except psutil.Error:
        return False


def _most_files() -> int:
    """The number of open files that a program of the stack may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 65536 if most == resource.RLIM_INFINITY else min(most, 65536)


def _section(name: str, **settings: object) -> str:
    lines: Iterator[str] = (f"{key}={str(value).replace('%', '%%')}" for key, value in settings.items())
    return "\n".join([f"[{name}]", *lines]) + "\n"
