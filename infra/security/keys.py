"""The key pairs with which services sign tokens (JWT, RFC 7519, with Ed25519, RFC 8037).

Each service has a private key in a file of its own. One file, a JWK set (RFC 7517), has the public keys of all. The
``kid`` of a key is ``<service>.<thumbprint>``, so it also names the owner. Both files are read again when they change:
a rotation adds the new public key, replaces the private key, and then removes the old public key.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from jwt.algorithms import OKPAlgorithm

from infra.errors import Transient, Unauthenticated, describe
from infra.security.watched import Watched

LIFETIME_SECONDS = 60
LEEWAY_SECONDS = 5
"""The largest difference between the clocks of two machines."""
_ALGORITHM = "EdDSA"


def key_id(service: str, public: Ed25519PublicKey) -> str:
    """The ``kid`` of a service's key."""
    return f"{service}.{hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]}"


def private_pem(key: Ed25519PrivateKey) -> str:
    """The content of a private key's file."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_jwk(service: str, public: Ed25519PublicKey) -> dict[str, str]:
    """A member of the file of public keys."""
    jwk: dict[str, str] = OKPAlgorithm.to_jwk(public, as_dict=True)
    return {**jwk, "kid": key_id(service, public), "use": "sig", "alg": _ALGORITHM}


def read_private(path: Path) -> Ed25519PrivateKey:
    """The private key in the file. Raises ValueError, also if every user of the machine can read the file."""
    if path.stat().st_mode & 0o007:
        raise ValueError(f"{path}: other users can read this private key; set its mode to 0600")
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: must be an Ed25519 private key as PEM")
    return key


def read_public(path: Path) -> dict[str, Ed25519PublicKey]:
    """``kid`` → public key. Raises ValueError."""
    try:
        keys = {
            jwk["kid"]: Ed25519PublicKey.from_public_bytes(_raw(jwk)) for jwk in json.loads(path.read_text())["keys"]
        }
    except (ValueError, TypeError, KeyError, jwt.InvalidKeyError) as error:
        raise ValueError(f"{path}: must be a JWK set of Ed25519 keys ({describe(error)})") from None
    if wrong := [kid for kid, key in keys.items() if kid != key_id(_owner(kid), key)]:
        raise ValueError(f"{path}: kid {wrong[0]}: must be <service>.<thumbprint of the key>")
    return keys


def _raw(jwk: Mapping[str, str]) -> bytes:
    key = OKPAlgorithm.from_jwk(dict(jwk))
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("a key is private or of another kind")
    return key.public_bytes_raw()


def _owner(kid: str) -> str:
    return kid.rpartition(".")[0]


class Keyring:
    """The private key of `service`, and the public keys of all services. Raises ValueError for unusable files."""

    def __init__(self, service: str, private: Path, public: Path) -> None:
        self.service = service
        self._private = Watched(private, read_private)
        self.public = Watched(public, read_public)

    def sign(self, audience: str | list[str], **claims: Any) -> str:
        """A token of this service for `audience`, valid for a minute."""
        self._private.look(now=True)
        key = self._private.content
        now = int(time.time())
        return jwt.encode(
            {"iss": self.service, "aud": audience, "iat": now, "exp": now + LIFETIME_SECONDS, **claims},
            key,
            algorithm=_ALGORITHM,
            headers={"kid": key_id(self.service, key.public_key())},
        )

    def verify(self, token: str, audience: str, *, expired_seconds: float = 0) -> dict[str, Any]:
        """The claims of a token; ``iss`` is the owner of its key. Raises Unauthenticated with the token's fault, and
        Transient for one that is not valid yet or not any more.

        expired_seconds: a token that expired at most this time ago is accepted, and an older one is a fault.
        """
        self.public.look()
        try:
            kid = jwt.get_unverified_header(token).get("kid", "")
            if kid not in self.public.content:
                # A service that has just been given a new key.
                self.public.look(now=True)
            if kid not in self.public.content:
                raise Unauthenticated(f"token: its key {kid!r} is not in {self.public.path.name}")
            claims: dict[str, Any] = jwt.decode(
                token,
                self.public.content[kid],
                algorithms=[_ALGORITHM],
                audience=audience,
                issuer=_owner(kid),
                leeway=LEEWAY_SECONDS + expired_seconds,
                options={"require": ["iss", "aud", "iat", "exp"]},
            )
        except jwt.ExpiredSignatureError as error:
            if expired_seconds:
                raise Unauthenticated("token: expired long ago") from error
            # The signature is good: the client can do nothing about it.
            raise Transient("token: expired; the request waited too long, or the clocks do not agree") from error
        except jwt.ImmatureSignatureError as error:
            # The signature is good: the client can do nothing about it.
            raise Transient("token: not yet valid; check that the clocks of both machines agree") from error
        except jwt.InvalidAudienceError as error:
            raise Unauthenticated(f"token: not made for {audience}") from error
        except jwt.InvalidIssuerError as error:
            raise Unauthenticated(f"token: {_owner(kid)} has signed it in the name of another service") from error
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"token: {error}") from error
        if claims["exp"] - claims["iat"] > LIFETIME_SECONDS:
            raise Unauthenticated(f"token: valid for more than {LIFETIME_SECONDS} s")
        return claims
