"""Signatures of Standard Webhooks, version 1 with a shared secret (standard-webhooks, spec/standard-webhooks.md)."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Mapping
from datetime import datetime, timedelta

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
        SIGNATURE_HEADER: _signature(read_secret(secret), id_, timestamp, body),
    }


def verify(secret: str, headers: Mapping[str, str], body: bytes, now: datetime) -> str:
    """The id of the message with these headers (names in lower case) and this raw `body`.

    Raises Unauthenticated if a header is missing, no signature of version 1 fits, or the message was signed more than
    five minutes before or after `now`; InvalidMessage for a bad secret.
    """
    key = read_secret(secret)
    id_, timestamp, signatures = (headers.get(name, "") for name in (ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER))
    for name, value in ((ID_HEADER, id_), (TIMESTAMP_HEADER, timestamp), (SIGNATURE_HEADER, signatures)):
        if not value:
            raise Unauthenticated(f"header {name}: missing")
    # A time of this century has fewer digits, and int() is slow for long texts.
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 12):
        raise Unauthenticated(f"header {TIMESTAMP_HEADER}: must be seconds since 1970")
    if abs(now.timestamp() - int(timestamp)) > TOLERANCE.total_seconds():
        raise Unauthenticated(f"header {TIMESTAMP_HEADER}: more than {TOLERANCE.seconds} s from now")
    expected = _signature(key, id_, timestamp, body).encode()
    # There are several signatures while a secret is rotated. All are compared, so that the time reveals nothing.
    fits = [hmac.compare_digest(expected, given.encode()) for given in signatures.split(" ")]
    if not any(fits):
        raise Unauthenticated(f"header {SIGNATURE_HEADER}: does not fit")
    return id_


def _signature(key: bytes, id_: str, timestamp: str, body: bytes) -> str:
    content = b".".join((id_.encode(), timestamp.encode(), body))
    return f"v1,{base64.b64encode(hmac.digest(key, content, 'sha256')).decode()}"
