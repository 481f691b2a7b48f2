"""Root only prepares the machine; the stack and every command about it run as the owner of the state folder."""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

from tooling.stack.checkout import readable_code
from tooling.stack.engines.base import EngineError, make_folder
from tooling.stack.home import STATE, home_folder
from tooling.stack.machine import USER

# Held while root makes the user. Two `useradd` of one name at the same time leave a home that belongs to neither.
LOCK = Path("/run/clawbus.lock")


def leave_root() -> None:
    """For root, runs this command again as the owner of the stack; for any other user, does nothing.

    PostgreSQL refuses root, and no program that listens on a port should run as root. The user `clawbus` gets a state
    folder that is missing or belongs to root; a folder of another user stays theirs. If the checkout is closed to other
    users, the command runs from a copy of the code.
    Raises EngineError if the owner cannot enter a folder that the command needs.
    """
    if os.geteuid() != 0:
        return
    home = home_folder()
    user = stack_user(home)
    # The user's own folder is made again after a person or a program has deleted it.
    for folder in (Path(user.pw_dir), home) if user.pw_name == USER else ():
        make_folder(folder, "CLAW_HOME")
        if folder.stat().st_uid == 0:
            subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
    code = readable_code()
    _check_reach(user.pw_name, [home, code / "infra" / "__init__.py", Path(sys.executable), Path(os.__file__)])
    command = [*_as(user.pw_name), sys.executable, "-m", "tooling.cli", *sys.argv[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= {"HOME": user.pw_dir, "USER": user.pw_name, "CLAW_HOME": str(home), "PYTHONPATH": str(code)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    # The current folder may be one that the user cannot enter.
    os.chdir(code)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def _as(user: str) -> list[str]:
    """The words before a command that make it run as this user."""
    if not (setpriv := shutil.which("setpriv")):
        raise EngineError("setpriv is missing: install util-linux, or run ./claw as an ordinary user")
    return [setpriv, f"--reuid={user}", f"--regid={pwd.getpwnam(user).pw_gid}", "--init-groups"]


def _check_reach(user: str, paths: list[Path]) -> None:
    """Raises EngineError for the first path that the user cannot read."""
    script = 'for path; do test -r "$path" || { echo "$path"; exit; }; done'
    probe = [*_as(user), "sh", "-c", script, "sh", *map(str, paths)]
    if closed := subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip():
        advice = (
            "set CLAW_HOME to a folder that this user can enter, or leave it unset"
            if closed == str(home_folder())
            else "open it (chmod a+rX) together with each folder above it, or run ./claw as an ordinary user"
        )
        raise EngineError(f"the user {user}, who runs the engines, cannot read {closed}: {advice}")


def stack_user(home: Path) -> pwd.struct_passwd:
    """The user who runs the stack of this state folder, if root asks: its owner, or `clawbus`, made if it is missing.

    Raises EngineError if the owner is not a user of this machine.
    """
    if home.exists() and (owner := home.stat().st_uid) != 0:
        try:
            return pwd.getpwuid(owner)
        except KeyError:
            raise EngineError(
                f"{home} belongs to the user number {owner}, who is not a user of this machine: give it to one with "
                "chown -R, or set CLAW_HOME to another folder"
            ) from None
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return pwd.getpwnam(USER)
        except KeyError:
            print(f"Making the system user {USER}, who will run the stack.", file=sys.stderr)  # noqa: T201
            command = ["useradd", "--system", "--user-group", "--create-home", "--home-dir", str(STATE)]
            subprocess.run([*command, "--shell", "/usr/sbin/nologin", USER], check=True)
            return pwd.getpwnam(USER)
