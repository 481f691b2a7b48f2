"""A line of text about the head of a chain, which an auditor keeps outside of the platform.

A chain in the database proves only that its records fit each other: who can write the database can make all of it new.
The line is authenticated with a key that is not in the database.
"""

from __future__ import annotations

import base64

from infra.errors import InvalidMessage
from infra.security.crypto import Cipher
from services.log_aggregator.domain import Head

_PURPOSE = "audit head"
_FORM = "clawbus-audit-1"


def write(cipher: Cipher, tenant_id: str, head: Head) -> str:
    """``clawbus-audit-1 <tenant, - for the system> <seq> <hash> <proof>``."""
    proof = cipher.seal("", _PURPOSE, tenant_id, str(head.seq), head.hash.hex())
    return f"{_FORM} {tenant_id or '-'} {head.seq} {head.hash.hex()} {base64.urlsafe_b64encode(proof).decode()}"


def read(cipher: Cipher, tenant_id: str, line: str) -> Head:
    """The head that the line names. Raises InvalidMessage if this platform has not issued it for this chain."""
    try:
        form, chain, seq, hash_, proof = line.split()
        if form != _FORM or chain != (tenant_id or "-"):
            raise ValueError
        cipher.open(base64.urlsafe_b64decode(proof), _PURPOSE, tenant_id, seq, hash_)
        return Head(int(seq), bytes.fromhex(hash_))
    except (ValueError, InvalidMessage, RuntimeError):
        # RuntimeError: the proof has the mark of another master key.
        raise InvalidMessage("line", "is not a line that this platform has issued for this chain") from None
