"""Key pairs of services for tests, made from the services' names: every process of a test has the same ones."""

from __future__ import annotations

import atexit
import base64
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.security.auth import Callers, Identities, Identity
from infra.security.keys import Keyring
from protos.catalog import SERVICES
from tooling.stack.keys import write_private, write_public

NAMES = (*SERVICES, "sample_front", "sample_desk", "sample_ledger", "sample_courier", "desk", "tally")
MASTER_KEY = base64.b64encode(b"a master key of 32 bytes, for me").decode()


def private_key(service: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"a test's key of {service}".encode()).digest())


def environment(service: str) -> dict[str, str]:
    """The variables that give a service process its keys."""
    return {
        "CLAW_PRIVATE_KEY_FILE": str(_folder() / f"{service}.pem"),
        "CLAW_PUBLIC_KEYS_FILE": str(_folder() / "public.json"),
        "CLAW_MASTER_KEY_FILE": str(_folder() / "master.txt"),
    }


def keyring(service: str) -> Keyring:
    return Keyring(service, _folder() / f"{service}.pem", _folder() / "public.json")


def callers(service: str) -> Callers:
    return Callers(keyring(service))


def identities(service: str) -> Identities:
    return Identities(keyring(service))


def identity_token(identity: Identity) -> str:
    """A token of this client as the user service makes it, but for all services, so that a test can go to any."""
    return keyring("user").sign(
        [f"{service}/http" for service in NAMES],
        sub=identity.actor,
        tenant=identity.tenant_id,
        key=identity.key_id,
        scopes=sorted(identity.scopes),
        groups=sorted(identity.groups),
    )


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="clawbus-keys-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in NAMES:
        write_private(folder / f"{name}.pem", private_key(name))
    write_public(folder / "public.json", {name: [private_key(name).public_key()] for name in NAMES})
    (folder / "master.txt").write_text(MASTER_KEY)
    return folder
