"""A line of text about the head of a chain, which an auditor keeps outside of the platform.

A chain in the database proves only that its records fit each other: who can write the database can make all of it new.
The line is authenticated with a key that is not readable in the database. The key never changes: a rotation of the
master key seals it again, so that lines which were kept stay valid.
"""

from __future__ import annotations

import base64
import hmac
import json
import os

from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.security.crypto import KEY_BYTES, Cipher
from infra.security.rewrap import SealedColumn
from services.log_aggregator.audit.domain import ChainHead

_PURPOSE = "audit line key"
_FORM = "clawbus-audit-2"
SEALED = SealedColumn("audit_line_key", "key", _PURPOSE, ())


class AuditLines:
    """Writes and reads lines. `database` has the sealed key, which is made at the first use."""

    def __init__(self, database: Database, cipher: Cipher) -> None:
        self._database = database
        self._cipher = cipher
        self._key = b""

    async def write(self, tenant_id: str, head: ChainHead) -> str:
        """``clawbus-audit-2 <tenant, - for the system> <seq> <hash> <proof>``."""
        return self.text(tenant_id, str(head.seq), head.hash.hex(), await self._proof(tenant_id, head))

    @staticmethod
    def text(tenant_id: str, seq: str, hash_: str, proof: str) -> str:
        """The line of these parts, which may be made up."""
        return f"{_FORM} {tenant_id or '-'} {seq} {hash_} {proof}"

    async def read(self, tenant_id: str, line: str) -> ChainHead:
        """The head that the line names. Raises InvalidMessage if this platform has not issued it for this chain."""
        try:
            form, chain, seq, hash_, proof = line.split()
            head = ChainHead(int(seq), bytes.fromhex(hash_))
            genuine = hmac.compare_digest(proof, await self._proof(tenant_id, head))
            if (form, chain, genuine) != (_FORM, tenant_id or "-", True):
                raise ValueError
        except ValueError:
            raise InvalidMessage("line", "is not a line that this platform has issued for this chain") from None
        return head

    async def _proof(self, tenant_id: str, head: ChainHead) -> str:
        if not self._key:
            self._key = await self._stored()
        content = json.dumps([tenant_id, head.seq, head.hash.hex()]).encode()
        return base64.urlsafe_b64encode(hmac.digest(self._key, content, "sha256")).decode()

    async def _stored(self) -> bytes:
        async with self._database.begin() as tx:
            await tx.sql(
                "INSERT INTO audit_line_key (key) VALUES ($1) ON CONFLICT DO NOTHING",
                self._cipher.seal(os.urandom(KEY_BYTES), _PURPOSE),
            )
            [(sealed,)] = await tx.sql("SELECT key FROM audit_line_key")
        return self._cipher.open(sealed, _PURPOSE)
