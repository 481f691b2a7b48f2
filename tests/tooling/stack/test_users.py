"""Tests of stacks that ordinary users start from clones of their own: with sudo, without it, and two users at once."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tooling.stack import privileges
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError, cache_path
from tooling.stack.home import Home, usual_ports
from tooling.stack.machine import USER, user_name
from tooling.stack.privileges import stack_user
from tooling.stack.supervisor import end_all, orphans
from tooling.testing.stack import free_ports

ROOT = os.geteuid() == 0
# Two users without rights that every Debian has. A test that root does not run has one user only: its own.
NAMES = ("nobody", "daemon") if ROOT else (user_name(os.geteuid()),) * 2


@dataclass(frozen=True)
class Person:
    """A user of the machine, with a clone and a home folder of their own."""

    name: str
    folder: Path

    @property
    def clone(self) -> Path:
        return self.folder / "clone"

    @property
    def home(self) -> Path:
        """The state folder that `claw` chooses."""
        return self.clone / ".claw"

    def command(self, *arguments: str) -> list[str]:
        """`claw`, as this user."""
        user = pwd.getpwnam(self.name)
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if ROOT else []
        return [*become, str(self.clone / "claw"), *arguments]

    def environment(self, **variables: str) -> dict[str, str]:
        return {"HOME": str(self.folder), "USER": self.name, "PATH": os.environ["PATH"], **variables}

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(**variables),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def claw(self, *arguments: str) -> str:
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output


@contextmanager
def person(name: str, *, programs: bool = False) -> Iterator[Person]:
    """programs: with the programs that the engines download or unpack once for each user."""
    # Directly under /tmp: other users may not be able to enter TMPDIR, and a long path is too long for a socket.
    someone = Person(name, Path(tempfile.mkdtemp(prefix="claw-user-", dir="/tmp")))
    someone.home.mkdir(mode=0o700, parents=True)
    (someone.home / "ports.json").write_text(json.dumps(free_ports(list(usual_ports()))))
    for part in ("infra", "protos", "services", "tooling"):
        shutil.copytree(CHECKOUT / part, someone.clone / part)
    for part in ("claw", "requirements.txt", "requirements-test.txt"):
        shutil.copy(CHECKOUT / part, someone.clone)
    assert (Path(sys.prefix) / "requirements-test.txt.installed").exists(), "make the environment with ./claw test"
    (someone.clone / ".venv").symlink_to(sys.prefix)
    cache = Path(pwd.getpwnam(USER).pw_dir, ".cache", "clawbus") if ROOT else cache_path()
    if programs and cache.exists():
        shutil.copytree(cache, someone.folder / ".cache" / "clawbus", symlinks=True)
    if ROOT:
        user = pwd.getpwnam(name)
        subprocess.run(["chown", "-Rh", f"{user.pw_uid}:{user.pw_gid}", str(someone.folder)], check=True)
    try:
        yield someone
    finally:
        end_all(someone.home, kill=True)
        shutil.rmtree(someone.folder)


@pytest.fixture
def someone() -> Iterator[Person]:
    with person(NAMES[0]) as only:
        yield only


def test_a_user_without_sudo_starts_a_stack_in_a_clone() -> None:
    with person(NAMES[0], programs=True) as someone:
        someone.claw("up", "--only", "postgres,valkey")
        assert {process.username() for process in orphans(someone.home)} == {someone.name}
        assert {path.owner() for path in someone.home.iterdir()} == {someone.name}
        findings = json.loads(someone.claw("doctor", "--json"))
        assert not [finding for finding in findings if finding["level"] == "problem"]
        if ROOT:
            before = owners(someone.home)
            by_root = [str(someone.clone / "claw"), "status", "--json"]
            done = subprocess.run(by_root, env=someone.environment(HOME="/root"), stdout=subprocess.PIPE, check=False)
            states = {part["name"]: part["state"] for part in json.loads(done.stdout)}
            assert {name for name, state in states.items() if state == "ready"} == {"postgres", "valkey"}
            assert owners(someone.home) == before
        someone.claw("down", "--wipe")
        assert orphans(someone.home) == []


def owners(folder: Path) -> dict[Path, str]:
    """The owner of each folder in it. The database makes and deletes files all the time."""
    return {path: path.owner() for path in (folder, *folder.rglob("*/"))}


@pytest.mark.skipif(not ROOT, reason="only root acts for another user")
def test_root_gives_clawbus_a_state_folder_only_if_it_is_its_own(tmp_path: Path) -> None:
    assert stack_user(tmp_path).pw_name == stack_user(tmp_path / "missing").pw_name == USER
    os.chown(tmp_path, pwd.getpwnam(NAMES[0]).pw_uid, -1)
    assert stack_user(tmp_path).pw_name == NAMES[0]
    # Of a user who was deleted, or of a container.
    os.chown(tmp_path, 3_999_999, -1)
    with pytest.raises(EngineError, match="user number 3999999, who is not a user of this machine"):
        stack_user(tmp_path)


def test_two_commands_of_root_make_the_user_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []
    both = threading.Barrier(2)

    def user_of(_: str) -> pwd.struct_passwd:
        if not made:
            raise KeyError
        return pwd.getpwuid(0)

    def makes(command: list[str], **_: object) -> None:
        with suppress(threading.BrokenBarrierError):
            both.wait(1)
        made.append(command)

    monkeypatch.setattr(privileges, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(pwd, "getpwnam", user_of)
    monkeypatch.setattr(subprocess, "run", makes)
    with ThreadPoolExecutor() as threads:
        list(threads.map(stack_user, [tmp_path / "one", tmp_path / "other"]))
    assert len(made) == 1


@pytest.mark.skipif(not ROOT, reason="only root acts for another user")
def test_files_that_root_writes_into_a_state_folder_belong_to_its_owner(tmp_path: Path) -> None:
    os.chown(tmp_path, pwd.getpwnam(NAMES[0]).pw_uid, -1)
    Home(tmp_path).place().secret("postgres.admin")
    assert {path.name: path.owner() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("ports.json", "secrets.json"), NAMES[0]
    )


def test_up_and_doctor_say_in_one_sentence_that_a_state_folder_is_of_another_user() -> None:
    with person(NAMES[0]) as owner, person(NAMES[1]) as other:
        if not ROOT:
            owner.home.chmod(0o555)
        sentence = (
            f"the user {other.name}, who runs the engines, cannot write {owner.home}: "
            f"run ./claw as the user {owner.name}, or set CLAW_HOME to a folder of your own"
        )
        up = other.start("up", "--only", "valkey", CLAW_HOME=str(owner.home))
        assert (up.communicate()[0], up.returncode) == (f"claw: {sentence}\n", 1)
        doctor = other.start("doctor", "--json", CLAW_HOME=str(owner.home))
        findings = json.loads(doctor.communicate()[0])
        assert [finding["what"] for finding in findings if finding["level"] == "problem"] == [sentence]
        assert doctor.returncode == 1


def test_two_users_of_one_machine_run_milvus_at_the_same_time() -> None:
    """The server's own run-time folder would be /run/milvus or /tmp/milvus: it belongs to the first who starts it."""
    with person(NAMES[0], programs=True) as first, person(NAMES[1], programs=True) as second:
        starts = [(someone, someone.start("up", "--only", "milvus")) for someone in (first, second)]
        for someone, up in starts:
            output, _ = up.communicate()
            assert up.returncode == 0, output
            assert (someone.home / "milvus" / "run" / "process").owner() == someone.name


# A machine without RabbitMQ: the mounts are visible in the namespace of one command only. With `sudo`, the user may
# become root. `apt-get` installs nothing: it writes its caller and its arguments to the file "$2".
WITHOUT_RABBITMQ = """
set -eu
mount -t tmpfs none /usr/sbin
mount -t tmpfs none /usr/lib/rabbitmq
mount -t tmpfs -o mode=755 none "$1"
install -m 755 /dev/null "$1/apt-get"
printf '#!/bin/sh\\necho "$(id -u) $*" >>"%s"\\n' "$2" >"$1/apt-get"
if [ "$3" = sudo ]; then
    install -m 4755 /usr/bin/setpriv "$1/become"
    install -m 755 /dev/null "$1/sudo"
    printf '#!/bin/sh\\nshift\\nexec "%s/become" --reuid=0 --regid=0 --clear-groups "$@"\\n' "$1" >"$1/sudo"
fi
shift 3
exec "$@"
"""


def on_a_machine_without_rabbitmq(someone: Person, *arguments: str, sudo: bool) -> tuple[int, str, str]:
    """Exit code and output of `claw`, and the calls of apt-get."""
    tools, calls = someone.folder / "tools", someone.folder / "calls"
    tools.mkdir()
    script = ["sh", "-c", WITHOUT_RABBITMQ, "sh", str(tools), str(calls), "sudo" if sudo else "none"]
    done = subprocess.run(
        ["unshare", "--mount", *script, *someone.command(*arguments)],
        env=someone.environment(PATH=f"{tools}:{os.environ['PATH']}"),
        cwd=someone.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text() if calls.exists() else ""


@pytest.mark.skipif(not ROOT, reason="only root can hide RabbitMQ from a command")
def test_for_a_user_with_sudo_rabbitmq_is_installed_by_root_and_the_stack_runs_as_the_user(someone: Person) -> None:
    code, output, calls = on_a_machine_without_rabbitmq(someone, "up", "--only", "valkey", sudo=True)
    assert code == 0, output
    assert "claw: installing rabbitmq-server with apt\n" in output
    assert calls == "0 install --yes -qq -o Dpkg::Use-Pty=0 --no-install-recommends rabbitmq-server\n"
    assert {process.username() for process in orphans(someone.home)} == {someone.name}


@pytest.mark.skipif(not ROOT, reason="only root can hide RabbitMQ from a command")
@pytest.mark.parametrize("command", ["install", "start", "restore"])
def test_each_command_that_starts_a_stack_installs_rabbitmq(someone: Person, command: str) -> None:
    _, _, calls = on_a_machine_without_rabbitmq(someone, command, "--help", sudo=True)
    assert calls.endswith(" rabbitmq-server\n")


@pytest.mark.skipif(not ROOT, reason="only root can hide RabbitMQ from a command")
def test_a_user_without_sudo_is_told_how_to_install_rabbitmq(someone: Person) -> None:
    code, output, calls = on_a_machine_without_rabbitmq(someone, "up", "--only", "rabbitmq", sudo=False)
    assert code == 1
    assert calls == ""
    assert output.splitlines()[-1] == (
        "claw: RabbitMQ is not installed, and this user may not install it. Run as root: "
        "apt-get install --no-install-recommends rabbitmq-server (on Debian or Ubuntu)"
    )
