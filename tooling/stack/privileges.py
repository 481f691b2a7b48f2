"""Root only prepares the machine; the stack and every command about it run as an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
from pathlib import Path

from tooling.stack.engines.base import EngineError
from tooling.stack.home import CHECKOUT, home_folder

USER = "clawbus"
_HOME = "/var/lib/clawbus"


def leave_root() -> None:
    """Does nothing for an ordinary user; for root, runs this very command again as the user `clawbus`.

    Makes that user if missing and gives it the state folder. PostgreSQL refuses root, and nothing that listens on a
    port should be root. Raises EngineError where the user cannot reach the checkout.
    """
    if os.geteuid() != 0:
        return
    home = home_folder()
    user = _user()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    if home.stat().st_uid != user.pw_uid:
        subprocess.run(["chown", "-R", f"{USER}:{USER}", str(home)], check=True)
    command = [*as_user(home), sys.executable, "-m", "tooling.cli", *sys.argv[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= {"HOME": _HOME, "USER": USER, "CLAW_HOME": str(home), "PYTHONPATH": str(CHECKOUT)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    # Its former folder may be one that the user cannot enter.
    os.chdir(CHECKOUT)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)


def as_user(home: Path) -> list[str]:
    """The words before a command that make it run as `clawbus`."""
    setpriv = shutil.which("setpriv")
    if not setpriv:
        raise EngineError("setpriv is missing: install util-linux, or run as an ordinary user")
    plain = [setpriv, f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
    needed = [Path(sys.executable).resolve(), Path(sys.prefix) / "pyvenv.cfg", CHECKOUT / "infra/__init__.py", home]
    closed = [path for path in needed if not _open_to_all(path)]
    if not closed:
        return plain
    # A checkout below /root, say: the user may read there, but not write.
    reading = [*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    probe = subprocess.run([*reading, "test", "-e", str(closed[0])], capture_output=True, check=False)
    if probe.returncode:
        raise EngineError(
            f"{closed[0]} cannot be reached by the user {USER}, as which the stack runs: move the checkout to a folder "
            "that is open to all (such as /opt), or run ./claw as an ordinary user"
        )
    return reading


def _user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(USER)
    except KeyError:
        print(f"Making the system user {USER}, as which the stack will run.", file=sys.stderr)  # noqa: T201
        command = ["useradd", "--system", "--user-group", "--create-home", "--home-dir", _HOME]
        subprocess.run([*command, "--shell", "/usr/sbin/nologin", USER], check=True)
        return pwd.getpwnam(USER)


def _open_to_all(path: Path) -> bool:
    """Others may enter every folder above it, and read it."""
    above = all(folder.stat().st_mode & stat.S_IXOTH for folder in path.parents)
    return above and (path.stat().st_uid != 0 or bool(path.stat().st_mode & stat.S_IROTH))
