"""The heads of the audit chains in the object store: no account of the database can change them there.

A user who can write the database can make a chain new as a whole, or cut its end off. Each hour an object is
stored for each chain that has grown. Its content is the auditor's line of the head, and its path has the same position,
hash and proof. So an object is never overwritten with another content, and a verification needs only the list of paths.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import quote

from infra.errors import InvalidMessage, Transient, describe
from infra.observe.logs import get_logger
from infra.postgres.database import Database
from infra.service.periodic import Periodic
from infra.stores.objects import Objects
from services.log_aggregator.audit import chains
from services.log_aggregator.audit.domain import ChainHead
from services.log_aggregator.audit.lines import AuditLines

BUCKET = "openclaw-audit"
STORE_SECONDS = 3600.0
RETRY_SECONDS = 60.0


class HeadsComparison(NamedTuple):
    """The stored heads of a chain, compared with the chain."""

    heads: int
    newest: int
    """The seq of the newest one; 0 if there is none."""
    mismatch_at: int | None
    """The seq of the first one that the chain does not have, or that this platform has not issued."""


class StoredHeads:
    """The objects of all chains. `prefix` stands before the path of each."""

    def __init__(self, objects: Objects, lines: AuditLines, prefix: str) -> None:
        self._objects = objects
        self._lines = lines
        self._prefix = prefix

    async def store(self, tenant_id: str, head: ChainHead) -> None:
        """Path: ``<tenant, - for the system>/<seq, 20 digits>-<hash>-<proof>``."""
        line = await self._lines.write(tenant_id, head)
        name = f"{head.seq:020}-{head.hash.hex()}-{line.rpartition(' ')[2]}"
        await self._objects.put_once(self._folder(tenant_id) + name, line.encode())

    async def compare(self, database: Database, tenant_id: str) -> HeadsComparison | None:
        """Compares every stored head with the chain. None if the object store does not answer."""
        folder = self._folder(tenant_id)
        try:
            names = [path.removeprefix(folder) for path in await self._objects.paths(folder)]
        except Transient as error:
            get_logger("services.log_aggregator.audit.stored_heads").warning(
                "could not list the stored heads; the chain is verified without them", error=describe(error)
            )
            return None
        heads = []
        wrong = []
        for name in names:
            seq, hash_, proof = (*name.split("-", 2), "", "")[:3]
            try:
                heads.append(await self._lines.read(tenant_id, AuditLines.text(tenant_id, seq, hash_, proof)))
            except InvalidMessage:
                # Also if the key of the lines was replaced to make the stored heads worthless.
                wrong.append(int(seq) if seq.isdecimal() else 1)
        wrong += [head.seq for head in await chains.lacking(database, tenant_id, heads)]
        return HeadsComparison(len(names), max((head.seq for head in heads), default=0), min(wrong, default=None))

    def _folder(self, tenant_id: str) -> str:
        return f"{self._prefix}{quote(tenant_id, safe='') or '-'}/"


class Keeper(Periodic):
    """Stores the head of each chain that has grown, every hour. Runs until stopped; several processes may run it."""

    failure = "could not store the heads of the audit chains"

    def __init__(self, database: Database, stored: StoredHeads) -> None:
        super().__init__()
        self._database = database
        self._stored = stored
        self._last: dict[str, int] = {}

    async def tick(self) -> None:
        self.pause = RETRY_SECONDS
        async with self._database.begin() as tx:
            rows = await tx.sql("SELECT tenant_id, seq, hash FROM audit_head WHERE seq > 0 ORDER BY tenant_id")
        for tenant_id, seq, hash_ in rows:
            if self._stopping.is_set():
                return
            if self._last.get(tenant_id) != seq:
                await self._stored.store(tenant_id, ChainHead(seq, bytes(hash_)))
                self._last[tenant_id] = seq
        self.pause = STORE_SECONDS
