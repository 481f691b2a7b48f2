"""Tests of a checkout, and of folders, that the user who runs the engines cannot read or write."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tooling.stack import checkout
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import STATE
from tooling.stack.machine import USER, user_name
from tooling.stack.supervisor import orphans
from tooling.testing.stack import private_home, run_claw

ROOT = os.geteuid() == 0


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A clone in a folder that only this test's user can enter, as root's home folder is. It has this environment."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("infra", "protos", "services", "tooling"):
        shutil.copytree(CHECKOUT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("claw", "requirements.txt", "requirements-test.txt"):
        shutil.copy(CHECKOUT / name, clone)
    tmp_path.chmod(0o700)
    assert (Path(sys.prefix) / "requirements-test.txt.installed").exists(), "make the environment with ./claw test"
    beside = outside(clone) if ROOT else clone
    beside.mkdir(parents=True, exist_ok=True)
    (beside / ".venv").symlink_to(sys.prefix)
    yield clone
    if ROOT:
        shutil.rmtree(beside)


def outside(clone: Path) -> Path:
    """The folder of root's environment and copy of this clone."""
    return Path("/usr/local/lib/clawbus") / python(clone, "tooling.stack.checkout", "closed_name()")


def python(clone: Path, module: str, expression: str) -> str:
    """The value of an expression of a module of the clone, evaluated by this user."""
    environment = {name: value for name, value in os.environ.items() if name != "CLAW_HOME"}
    program = f"from {module} import *; print({expression})"
    command = [sys.executable, "-c", program]
    environment["PYTHONPATH"] = str(clone)
    return subprocess.check_output(command, text=True, env=environment, cwd="/").strip()


def claw(clone: Path, home: Path, *arguments: str) -> str:
    environment = {**os.environ, "CLAW_HOME": str(home)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([clone / "claw", *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engines_run_from_a_checkout_that_their_user_cannot_enter(closed: Path) -> None:
    with private_home() as home:
        claw(closed, home, "up", "--only", "postgres,valkey")
        assert {process.username() for process in orphans(home)} == {USER if ROOT else user_name(os.geteuid())}
        findings = json.loads(claw(closed, home, "doctor", "--json"))
        assert not [finding for finding in findings if finding["level"] == "problem"]
        claw(closed, home, "down", "--wipe")


def test_the_copy_of_a_closed_checkout_follows_it(closed: Path) -> None:
    if not ROOT:
        assert python(closed, "tooling.stack.checkout", "readable_code()") == str(closed)
        return
    copy = Path(python(closed, "tooling.stack.checkout", "readable_code()"))
    assert copy == outside(closed) / "code"
    names = {path.relative_to(copy) for path in copy.rglob("*") if "__pycache__" not in path.parts}
    assert names == {
        path.relative_to(closed)
        for path in closed.rglob("*")
        if path.relative_to(closed).parts[0] in checkout._FOLDERS
        if "__pycache__" not in path.parts
    }
    assert all(path.stat().st_mode & stat.S_IROTH and path.owner() == "root" for path in copy.rglob("*"))
    assert list(copy.rglob("errors*.pyc"))
    (closed / "infra" / "errors.py").unlink()
    (closed / "infra" / "added.py").write_text("VALUE = 1\n")
    (closed / "infra" / "clock.py").write_text("VALUE = 2\n")
    (closed / "infra" / "clock.py").chmod(0o600)
    python(closed, "tooling.stack.checkout", "readable_code()")
    assert not (copy / "infra" / "errors.py").exists()
    assert (copy / "infra" / "added.py").read_text() == "VALUE = 1\n"
    assert (copy / "infra" / "clock.py").read_text() == "VALUE = 2\n"
    assert (copy / "infra" / "clock.py").stat().st_mode & 0o777 == 0o644


def test_the_state_of_a_closed_checkout_lies_outside_it(closed: Path) -> None:
    found = Path(python(closed, "tooling.stack.home", "home_folder()"))
    assert found.parent == (STATE if ROOT else closed)


def test_root_is_told_that_the_engines_cannot_enter_a_state_folder(tmp_path: Path) -> None:
    """An ordinary user's engines run as that user, who can enter it."""
    tmp_path.chmod(0o700)
    with private_home() as home:
        closed = tmp_path / "stack"
        shutil.copytree(home, closed)
        if not ROOT:
            run_claw(closed, "up", "--only", "valkey,postgres")
            run_claw(closed, "down", "--wipe")
            return
        with pytest.raises(
            RuntimeError, match=rf"the user {USER}, who runs the engines, cannot read {closed}: set CLAW"
        ):
            run_claw(closed, "up", "--only", "valkey")


def as_other(expression: str, **variables: str) -> str:
    """The result of a check for a user without rights. If root runs the test, it is the user with number 65534."""
    program = f"""
from pathlib import Path
from tooling.stack import checkout, machine
try:
    print({expression})
except machine.EngineError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if ROOT else []
    command = [*user, sys.executable, "-c", program]
    return subprocess.check_output(command, env=environment, cwd="/", text=True).strip()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can read, but in which only this test's user can write."""
    with private_home() as home:
        path = home.parent / "folder"
        (path / "stack" / "kafka").mkdir(parents=True)
        (path / "open").mkdir()
        (path / "open").chmod(0o777)
        path.chmod(0o555)
        yield path
        path.chmod(0o755)


def test_a_state_folder_that_cannot_be_written_is_named_with_its_owner(folder: Path) -> None:
    (folder / "stack" / "kafka").chmod(0o555)
    (folder / "stack").chmod(0o777)
    owner = user_name(os.geteuid())
    me = user_name(65534) if ROOT else owner
    cache = {"XDG_CACHE_HOME": "/tmp"}
    said = f"the user {me}, who runs the engines, cannot write %s: run ./claw as the user {owner}, or set CLAW_HOME"
    assert as_other(f"machine.check_access(Path('{folder}/new'))", **cache).startswith(said % (folder / "new"))
    stack = as_other(f"machine.check_access(Path('{folder}/stack'))", **cache)
    assert stack.startswith(said % (folder / "stack" / "kafka"))
    cached = as_other(f"machine.check_access(Path('{folder}/open'))", XDG_CACHE_HOME=str(folder))
    assert cached.endswith(f"cannot write {folder}/clawbus: set XDG_CACHE_HOME to a folder that this user can write")


def test_a_file_of_the_code_that_cannot_be_read_is_named(folder: Path) -> None:
    secret = folder / "open" / "secret.py"
    secret.touch(mode=0o600)
    if not ROOT:
        secret.chmod(0)
    assert as_other("checkout.unreadable()") == "None"
    found = as_other(f"setattr(checkout, '_FOLDERS', ['{folder}']) or checkout.unreadable()")
    assert found == str(secret)
