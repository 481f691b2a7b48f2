"""Confines a process that parses a stranger's file: limits of CPU and memory, no network, no other processes, and death
with its parent.

``python -m infra.security.confinement`` prints the protections that this machine does not allow, one a line.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys

# Three parsers of documents and the service itself fit into the container (4 GiB).
MAX_MEMORY_BYTES = 768 * 1024**2
MAX_CPU_SECONDS = 120
# For the text of an error.
_MAX_FILE_BYTES = 1024**2
_MAX_OPEN_FILES = 64
_NOBODY = 65_534

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_MODE_FILTER = 2
# Of linux/audit.h, in the order of the numbers below.
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Refused calls with their numbers on x86_64 and, if it has them, on aarch64.
_REFUSED: dict[str, tuple[int, ...]] = {
    # The network and other programs.
    **{"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "execve": (59, 221), "execveat": (322, 281)},
    **{"io_uring_setup": (425, 425), "bpf": (321, 280), "unshare": (272, 97), "mount": (165, 40)},
    # Other processes of its user, such as the service.
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424)},
    **{"prlimit64": (302, 261), "setpriority": (141, 140), "ioprio_set": (251, 30), "perf_event_open": (298, 241)},
    **{"sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274)},
    **{"migrate_pages": (256, 238), "move_pages": (279, 239), "sched_setparam": (142, 118)},
    # Things that would outlive the parser, or have limits of their own. prctl: it would no longer end with the service.
    **{"clone": (56, 220), "clone3": (435, 435), "fork": (57,), "vfork": (58,), "memfd_create": (319, 279)},
    **{"shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180)},
    **{"add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "prctl": (157, 167)},
    # Files of its user: Landlock lets these pass.
    **{"truncate": (76, 45), "chmod": (90,), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92,), "fchown": (93, 55), "lchown": (94,), "fchownat": (260, 54)},
    **{"utime": (132,), "utimes": (235,), "futimesat": (261,), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466)},
    **{"inotify_init": (253,), "inotify_init1": (294, 26), "fanotify_init": (300, 262), "file_setattr": (469, 469)},
}
# Of linux/fcntl.h: the call, and its commands that let the kernel send a signal to any process of its user.
_FCNTL = {"x86_64": 72, "aarch64": 25}
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
# Of linux/landlock.h: the calls, the first thirteen kinds of access to files, and those of reading.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ALL_ACCESS, _READ_ACCESS = 0x1FFF, 0x4 | 0x8
_PATH_BENEATH = 1
# Of linux/bpf_common.h and linux/seccomp.h.
_LOAD, _JUMP_EQUAL, _JUMP_GREATER, _RETURN = 0x20, 0x15, 0x35, 0x06
_KILL, _REFUSE, _ALLOW = 0x80000000, 0x00050001, 0x7FFF0000
# Calls of the x32 interface have this bit, and would pass by their other numbers.
_X32 = 0x40000000


def limit(cpu_seconds: int = MAX_CPU_SECONDS, memory_bytes: int = MAX_MEMORY_BYTES) -> None:
    """Sets the limits of CPU, memory and files."""
    os.nice(10)
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, _MAX_FILE_BYTES),
        (resource.RLIMIT_CORE, 0),
        # The memory of pipes is none of the process.
        (resource.RLIMIT_NOFILE, _MAX_OPEN_FILES),
    ):
        resource.setrlimit(what, (most, most))
    # At the first limit the kernel sends SIGXCPU, which tells the service the reason; at the second SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))


def confine(parent: int) -> list[str]:
    """Gives up everything that the parser does not need. Returns the protections that the machine does not allow.

    `parent` is the process id of the service: the process ends if the service has ended already. All modules must be
    imported before: the user of the process may be unable to read their files afterwards.
    """
    missing = []
    if os.getuid() == 0:
        # The superuser could read the memory and the environment of every process.
        try:
            os.setgroups([])
            os.setgid(_NOBODY)
            os.setuid(_NOBODY)
        except OSError as error:
            missing.append(f"a user without rights ({error.strerror})")
    if not _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        missing.append("end with the service")
    if os.getppid() != parent:
        sys.exit("the service has ended")
    # The files of other parsers and of the service are behind their entries in /proc.
    hide_memory()
    if not _refuse_files():
        missing.append("no files but its own (Landlock)")
    if not _refuse_calls():
        missing.append("no network and no other processes (seccomp)")
    return missing


def hide_memory() -> None:
    """Hides the environment and the memory of this process from other processes of its user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def _refuse_files() -> bool:
    """Lets the kernel refuse every file but Python's own (Landlock). Open files stay open."""
    ruleset = _call(_CREATE_RULESET, struct.pack("Q", _ALL_ACCESS), 8, 0)
    if ruleset < 0:
        return False
    for path in {sys.prefix, sys.base_prefix + "/lib", os.path.dirname(os.__file__), "/usr/share/zoneinfo"}:
        if os.path.isdir(path):
            folder = os.open(path, os.O_PATH)
            _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", _READ_ACCESS, folder), 0)
            os.close(folder)
    done = _prctl(_PR_SET_NO_NEW_PRIVS, 1) and _call(_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _refuse_calls() -> bool:
    """Lets the kernel refuse the calls of the list with EPERM (seccomp)."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    column = list(_ARCHITECTURES).index(machine)
    refused = [numbers[column] for numbers in _REFUSED.values() if column < len(numbers)]
    commands = (_F_SETOWN, _F_SETSIG, _F_SETOWN_EX)
    program = [
        (_LOAD, 0, 0, 4),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_GREATER, len(refused) + len(commands) + 3, 0, _X32),
        *((_JUMP_EQUAL, len(refused) - n + len(commands) + 2, 0, call) for n, call in enumerate(refused)),
        (_JUMP_EQUAL, 0, len(commands) + 1, _FCNTL[machine]),
        # The lower half of the second argument.
        (_LOAD, 0, 0, 24),
        *((_JUMP_EQUAL, len(commands) - n, 0, command) for n, command in enumerate(commands)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    filter_ = ctypes.create_string_buffer(code, len(code))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(filter_)))
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1) and _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _prctl(option: int, *arguments: int) -> bool:
    """Returns False if the kernel refuses, or is not Linux."""
    try:
        call = ctypes.CDLL(None, use_errno=True).prctl
    except AttributeError:
        return False
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    return bool(call(ctypes.c_int(option), *values) == 0)


def _call(number: int, *arguments: int | bytes) -> int:
    """A system call that the C library does not have. Negative if the kernel refuses it."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    values = [value if isinstance(value, bytes) else ctypes.c_long(value) for value in arguments]
    return int(call(ctypes.c_long(number), *values))


if __name__ == "__main__":
    for protection in confine(os.getppid()):
        print(protection)  # noqa: T201
