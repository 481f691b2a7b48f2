"""Signatures of Standard Webhooks, version 1 with a shared secret (standard-webhooks, spec/standard-webhooks.md)."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from datetime import datetime, timedelta
from functools import lru_cache

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC

from infra.errors import InvalidMessage, Unauthenticated

ID_HEADER = "webhook-id"
TIMESTAMP_HEADER = "webhook-timestamp"
SIGNATURE_HEADER = "webhook-signature"
TOLERANCE = timedelta(seconds=300)

_MIN_SECRET_BYTES, _MAX_SECRET_BYTES = 24, 64


def read_secret(secret: str) -> bytes:
    """The key in ``whsec_<base64>``. Raises InvalidMessage (field ``secret``), never showing it, for anything else."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidMessage("secret", "must be whsec_ followed by base64") from None
    if not _MIN_SECRET_BYTES <= len(key) <= _MAX_SECRET_BYTES:
        raise InvalidMessage("secret", f"must be base64 of {_MIN_SECRET_BYTES} to {_MAX_SECRET_BYTES} bytes")
    return key


def sign(secret: str, id_: str, at: datetime, body: bytes) -> dict[str, str]:
    """The three headers to send with `body`.

    id_: the same for each attempt of a message, because the receiver drops repeats by it; without a full stop.
    Raises InvalidMessage for a bad secret.
    """
    timestamp = str(int(at.timestamp()))
    return {
        ID_HEADER: id_,
        TIMESTAMP_HEADER: timestamp,
        SIGNATURE_HEADER: _signature(secret, id_, timestamp, body).decode(),
    }


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: datetime) -> str:
    """The id of the message with these headers (names in lower case) and this raw `body`.

    Raises Unauthenticated if a header is missing, no signature of version 1 fits, or the message was signed more than
    five minutes before or after `now`; InvalidMessage for a bad secret.
    """
    id_ = headers.get(ID_HEADER)
    timestamp = headers.get(TIMESTAMP_HEADER)
    signatures = headers.get(SIGNATURE_HEADER)
    if not (id_ and timestamp and signatures):
        missing = next(name for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER) if not headers.get(name))
        raise Unauthenticated(f"header {missing}: missing")
    # A time of this century has fewer digits, and int() is slow for long texts.
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        raise Unauthenticated(f"header {TIMESTAMP_HEADER}: must be seconds since 1970")
    if abs(now.timestamp() - int(timestamp)) > TOLERANCE.seconds:
        raise Unauthenticated(f"header {TIMESTAMP_HEADER}: more than {TOLERANCE.seconds} s from now")
    expected = _signature(secret, id_, timestamp, body)
    # There are several signatures while a secret is rotated. All are compared, so that the time reveals nothing.
    fits = [hmac.compare_digest(expected, given) for given in signatures.encode().split(b" ")]
    if True not in fits:
        raise Unauthenticated(f"header {SIGNATURE_HEADER}: does not fit")
    return id_


def _signature(secret: str, id_: str, timestamp: str, body: bytes) -> bytes:
    keyed = _keyed(secret).copy()
    keyed.update(f"{id_}.{timestamp}.".encode() + body)
    return b"v1," + binascii.b2a_base64(keyed.finalize(), newline=False)


# The key schedule would cost more than the digest of a usual message.
@lru_cache(maxsize=1024)
def _keyed(secret: str) -> HMAC:
    return HMAC(read_secret(secret), SHA256())
