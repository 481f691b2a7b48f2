"""The services' keys: a private key and a master key in a folder of each service, and one file with all public keys.

A rotation of the key pairs is ``add``, ``switch``, ``forget``. If it is interrupted, the next one completes it: at any
time each private key in use is in the file of public keys, so no call is refused. A rotation of the master keys is
``new_master``, then the values are sealed again, then ``forget_masters``.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from infra.security.crypto import KEY_BYTES
from infra.security.keys import key_id, private_pem, public_jwk, read_private, read_public
from tooling.stack.engines.base import write_atomically

_lock = threading.Lock()


def private_file(folder: Path, service: str) -> Path:
    """The file of the service's private key."""
    return folder / service / "private.pem"


def public_file(folder: Path) -> Path:
    """The file of all public keys."""
    return folder / "public" / "keys.json"


def master_file(folder: Path, service: str) -> Path:
    """The file of the service's master keys: the first line seals."""
    return folder / service / "master.txt"


def retired_file(folder: Path, service: str) -> Path:
    """The file of the master keys that only old backups need. No process reads it."""
    return folder / service / "master.retired.txt"


def make_keys(folder: Path, services: Sequence[str], shared: str = "") -> None:
    """Makes the missing keys. Changes no key that exists.

    shared: the master key that all services of an older version had. It stays until the next rotation.
    """
    with _lock:
        for service in services:
            private = private_file(folder, service)
            private.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not private.exists():
                write_private(private, Ed25519PrivateKey.generate())
            if not (master := master_file(folder, service)).exists():
                write_atomically(master, "\n".join([_random_key(), *shared.split()]))
        _publish(folder, {service: [read_private(private_file(folder, service)).public_key()] for service in services})


def _next_file(folder: Path, service: str) -> Path:
    return private_file(folder, service).with_suffix(".next")


def add(folder: Path, services: Sequence[str]) -> None:
    """Makes each service's next key, and publishes it beside its current one."""
    make_keys(folder, services)
    with _lock:
        for service in services:
            if not _next_file(folder, service).exists():
                write_private(_next_file(folder, service), Ed25519PrivateKey.generate())
        _publish(folder, {service: [read_private(_next_file(folder, service)).public_key()] for service in services})


def switch(folder: Path, services: Sequence[str]) -> None:
    """Lets each service sign with its next key. A running service notices it when it makes its next token."""
    for service in services:
        _next_file(folder, service).replace(private_file(folder, service))


def forget(folder: Path, services: Sequence[str]) -> int:
    """Removes all public keys except those of the current private keys. Returns the number of removed ones.

    Before that, the tokens of the old keys must have expired.
    """
    with _lock:
        known = read_public(public_file(folder))
        current = {service: [read_private(private_file(folder, service)).public_key()] for service in services}
        write_public(public_file(folder), current)
        return len(known) - len(current)


def new_master(folder: Path, service: str) -> bool:
    """Puts a new master key before the present one. False if an earlier rotation of this service is not complete."""
    path = master_file(folder, service)
    known = path.read_text().split()
    if len(known) > 1:
        return False
    write_atomically(path, "\n".join([_random_key(), *known]))
    return True


def forget_masters(folder: Path, service: str) -> None:
    """Takes the older master keys from the service. No stored value may need them any more."""
    first, *older = master_file(folder, service).read_text().split()
    retired = retired_file(folder, service)
    known = retired.read_text().split() if retired.exists() else []
    write_atomically(retired, "\n".join(dict.fromkeys([*known, *older])))
    write_atomically(master_file(folder, service), first)


def _random_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def write_private(path: Path, key: Ed25519PrivateKey) -> None:
    """Writes a private key, readable by its owner only."""
    write_atomically(path, private_pem(key))


def write_public(path: Path, keys: Mapping[str, Iterable[Ed25519PublicKey]]) -> None:
    """Writes the file of public keys: service → its keys."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = [public_jwk(service, key) for service, its in sorted(keys.items()) for key in its]
    write_atomically(path, json.dumps({"keys": found}, indent=1), mode=0o644)


def _publish(folder: Path, keys: Mapping[str, Iterable[Ed25519PublicKey]]) -> None:
    """Adds these public keys to those that are published."""
    path = public_file(folder)
    known = read_public(path) if path.exists() else {}
    wanted = known | {key_id(service, key): key for service, its in keys.items() for key in its}
    if wanted.keys() != known.keys():
        by_service: dict[str, list[Ed25519PublicKey]] = {}
        for kid, key in wanted.items():
            by_service.setdefault(kid.rpartition(".")[0], []).append(key)
        write_public(path, by_service)
