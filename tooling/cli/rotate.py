"""``./claw rotate``: new keys for the services while they run."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from infra.postgres.db import create_engine
from infra.security.crypto import Cipher
from infra.security.keys import LEEWAY_SECONDS, LIFETIME_SECONDS
from infra.security.rewrap import SealedColumn, count_old, rewrap
from tooling.cli import locks
from tooling.cli.output import Json, print_json
from tooling.stack import keys, operator
from tooling.stack.home import SERVICES

app = typer.Typer(no_args_is_help=True, help="Give the services new keys while they run.")
console = Console(stderr=True, highlight=False)
# Tokens of the old keys have expired. No transaction of a service lasts as long, so each value that was sealed under an
# old master key is stored.
SETTLE_SECONDS = LIFETIME_SECONDS + LEEWAY_SECONDS + 5

Wait = Callable[[float], Awaitable[None]]


@app.command()
def internal(as_json: Json = False) -> None:
    """Replace the key pairs with which services sign. Takes about a minute; no call is refused."""
    folder = operator.keys_folder()
    with alone(folder):
        asyncio.run(rotate_internal(folder, SERVICES))
    console.print("The services sign with new keys. The old keys are no longer accepted.")
    if as_json:
        print_json({"services": SERVICES})


@app.command()
def master(as_json: Json = False) -> None:
    """Replace the master keys, and seal all stored values under the new ones. If interrupted, call it again."""
    began = time.monotonic()
    folder = operator.keys_folder()
    with alone(folder):
        count = operator.run(rotate_master(folder, _database(), SERVICES))
    console.print(f"{count} values are sealed under new keys, after {time.monotonic() - began:.0f} s.")
    retired = str(keys.retired_file(folder, "*"))
    console.print(f"Old backups need the old keys: keep or destroy the files {retired}", soft_wrap=True)
    if as_json:
        print_json({"values": count, "retired": retired})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Waits until no other command replaces keys of this folder. Otherwise the end of one would remove public keys of
    tokens that are in use since the other one began. The lock ends with its process."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        locks.take(lock, "`./claw rotate`", console)
        yield
    finally:
        os.close(lock)


async def rotate_internal(folder: Path, services: Sequence[str], settle: Wait = asyncio.sleep) -> None:
    """Adds new public keys, lets the services sign with the new keys, and removes the old public keys."""
    keys.add(folder, services)
    keys.switch(folder, services)
    console.print(f"New keys are in use. The old ones end in {SETTLE_SECONDS} s …")
    await settle(SETTLE_SECONDS)
    keys.forget(folder, services)


async def rotate_master(folder: Path, url: str, services: Sequence[str], settle: Wait = asyncio.sleep) -> int:
    """Gives each service a new master key, seals its stored values again, and takes the old keys away.

    url: the administrator's URL of the database. Returns the number of values.
    """
    for service in services:
        if not keys.new_master(folder, service):
            console.print(f"{service}: goes on with an earlier rotation")
    count = 0
    for service in services:
        count += await _reseal(folder, url, service)
    console.print(f"Waiting {SETTLE_SECONDS} s for transactions that began before …")
    await settle(SETTLE_SECONDS)
    for service in services:
        count += await _reseal(folder, url, service, until_none=True)
        keys.forget_masters(folder, service)
    return count


async def _reseal(folder: Path, url: str, service: str, *, until_none: bool = False) -> int:
    """Seals the old values of a service again. With `until_none`, goes on until no old value is left."""
    columns: list[SealedColumn] = importlib.import_module(f"services.{service}.__main__").service.sealed
    cipher = Cipher(keys.master_file(folder, service))
    engine = create_engine(url, pool_size=1, name="claw rotate", schema=service)
    done = 0
    try:
        for column in columns:
            name = f"{service}.{column.table}.{column.column}"
            while left := await count_old(engine, cipher, column):
                console.print(f"{name}: {left} to do")

                def report(rows: int) -> None:
                    nonlocal done
                    done += rows

                await rewrap(engine, cipher, column, report)
                if not until_none:
                    break
                # The rows that are left were locked by transactions, which end.
                await asyncio.sleep(0.1)
    finally:
        await engine.dispose()
    return done


def _database() -> str:
    return os.environ.get("CLAW_ADMIN_DATABASE_URL") or operator.engines_access()["postgres"]["url"]
