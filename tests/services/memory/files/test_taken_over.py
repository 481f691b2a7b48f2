"""A parser that its file has taken over: its rights on the machine, and the limits of its output."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from infra.stores import filetypes as types
from services.memory.files import parser
from services.memory.files.parser import Findings
from tooling.stack.checkout import CHECKOUT

# Acts of a parser that its file has taken over, and the reason with which the file is refused.
TAKEN_OVER = {
    "says nothing in JSON": ("print('x' * 10)", "cannot be read"),
    "says no UTF-8": (r"""import os; os.write(1, b'{"text": "\xff"}\n')""", "cannot be read"),
    "says very nested JSON": ("print('{\"x\": ' + '[' * 10_000)", "cannot be read"),
    "says NUL": (r"""print('{"text": "a\u0000"}')""", "cannot be read"),
    "says a long passage": ("print('{\"text\": \"%s\"}' % ('x' * 100_001))", "cannot be read"),
    "says a page of 64 bits": ('print(\'{"text": "x", "page": 4294967296}\')', "cannot be read"),
    "says many pages": ('print(\'{"chunks": 1, "pages_without_text": %s}\' % list(range(10_001)))', "cannot be read"),
    "says many warnings": ('print(\'{"chunks": 1, "warnings": [%s""]}\' % (\'"",\' * 101))', "cannot be read"),
    "says a long warning": ('print(\'{"chunks": 1, "warnings": ["%s"]}\' % (\'x\' * 2_001))', "cannot be read"),
    "says other types": ("print('{\"text\": [5]}')", "cannot be read"),
    "has no line end": ("print('x' * (2**22 + 1), end='')", "too large"),
    "never ends": ('while True: print(\'{"text": "x"}\')', "more than 1 MiB"),
    "sleeps between lines": (
        'import time\nwhile True: print(\'{"text": "x"}\', flush=True); time.sleep(0.01)',
        "within 0",
    ),
}


@pytest.mark.parametrize("act", TAKEN_OVER)
async def test_a_parser_that_was_taken_over_gets_no_more_than_its_limits(
    act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, reason = TAKEN_OVER[act]
    start = asyncio.create_subprocess_exec
    started = []

    async def instead(python: str, *_: Any, **more: Any) -> asyncio.subprocess.Process:
        started.append(await start(python, "-c", program, **more))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", instead)
    monkeypatch.setattr(parser, "MAX_PARSED_BYTES", 2**20)
    if "sleeps" in act:
        monkeypatch.setattr(parser, "PARSE_SECONDS", 0.2)
    with tempfile.TemporaryFile() as file, pytest.raises(parser.DocumentRefused, match=reason):
        async for _ in parser.parsed(file, types.TEXT, Findings(), never_deleted):
            pass
    assert [process.returncode is not None for process in started] == [True]


async def never_deleted() -> None:
    """The check of a document that stays."""


# Each is refused by its number, even with arguments that no call takes: all of them are -1.
CALLS = """
socket socketpair connect execve execveat io_uring_setup bpf unshare mount ptrace process_vm_readv
process_vm_writev kcmp kill tkill tgkill pidfd_open rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal
prlimit64 setpriority ioprio_set perf_event_open sched_setaffinity sched_setscheduler sched_setattr
migrate_pages move_pages sched_setparam clone clone3 fork vfork memfd_create shmget semget msgget mq_open
add_key request_key keyctl prctl truncate chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime
utimes futimesat utimensat setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr
removexattrat inotify_init inotify_init1 fanotify_init file_setattr
"""
ATTEMPTS = """
import ctypes, fcntl, os, resource, socket, sys, tempfile, threading
from infra.security import confinement
parent, own = os.getppid(), os.getpid()
libc = ctypes.CDLL(None, use_errno=True)

# A file of the user that the parser will have.
mine = tempfile.NamedTemporaryFile()
if os.getuid() == 0:
    os.chown(mine.name, 65_534, 65_534)
reading = os.open(mine.name, os.O_RDONLY)

def child():
    os.fork() or os._exit(0)

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

attempts = {
    "network": lambda: socket.socket(),
    "program": lambda: os.execv("/bin/true", ["true"]),
    "signal": lambda: os.kill(parent, 0),
    "queued signal": lambda: call("sigqueue", own, 0, None),
    "limits of a process": lambda: resource.prlimit(own, resource.RLIMIT_CORE, (0, 0)),
    "priority of a process": lambda: os.setpriority(os.PRIO_PROCESS, own, 19),
    "processors of a process": lambda: os.sched_setaffinity(own, os.sched_getaffinity(own)),
    "process": child,
    "thread": lambda: threading.Thread(target=print).start(),
    "file in memory": lambda: os.memfd_create("x"),
    "shared memory": lambda: call("shmget", 0, 4096, 0o1600),
    "semaphores": lambda: call("semget", 0, 1, 0o1600),
    "messages": lambda: call("msgget", 0, 0o1600),
    "files of the service": lambda: open(f"/proc/{parent}/environ"),
    "memory of the service": lambda: open(f"/proc/{parent}/mem"),
    "a file": lambda: open("/etc/hostname"),
    "a new file": lambda: open("/tmp/a file of the parser", "w"),
    "a folder": lambda: os.listdir("/"),
    "cut a file": lambda: os.truncate(mine.name, 0),
    "rights of a file": lambda: os.chmod(mine.name, 0o666),
    "rights of an open file": lambda: os.fchmod(reading, 0o666),
    "owner of a file": lambda: os.chown(mine.name, -1, -1),
    "time of a file": lambda: os.utime(mine.name),
    "attribute of a file": lambda: os.setxattr(mine.name, "user.a", b"b"),
    "events of a folder": lambda: call("inotify_init"),
    "a signal by a file": lambda: fcntl.fcntl(reading, fcntl.F_SETOWN, parent),
    "number of such a signal": lambda: fcntl.fcntl(reading, 10, 9),
    "life beyond the service": lambda: call("prctl", 1, 0, 0, 0, 0),
    "many pipes": lambda: [os.pipe() for _ in range(100)],
}
column = ("x86_64", "aarch64").index(os.uname().machine)

def refused(name, number):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
    if ctypes.get_errno() == 1:
        raise PermissionError

for name in sys.argv[1:]:
    if numbers := confinement._REFUSED[name][column:]:
        attempts[name] = lambda name=name, number=numbers[0]: refused(name, number)
confinement.limit()
print(*confinement.confine(parent))
for name, attempt in attempts.items():
    try:
        attempt()
        print(name)
    except (PermissionError, RuntimeError):
        pass
    except OSError as error:
        if error.errno != 24:
            raise
"""


def test_code_in_the_parser_gets_no_network_no_processes_and_no_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, *CALLS.split()], cwd=CHECKOUT, capture_output=True, text=True, check=True
    )
    missing, *allowed = done.stdout.splitlines()
    if missing:
        pytest.skip(f"this machine does not allow: {missing}")
    assert allowed == []
