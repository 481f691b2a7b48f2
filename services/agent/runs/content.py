"""Sealed content of runs: how it is opened, and the content of a tool's step."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.errors import Conflict
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys

# The part of a person's message that is published with the reply.
SAID_CHARACTERS = 4_000


class Unsealer:
    """Opens sealed content within one transaction and reads the key of each subject once."""

    def __init__(self, tx: Tx, subjects: SubjectKeys) -> None:
        assert tx.tenant_id
        self._tx = tx
        self._tenant_id = tx.tenant_id
        self._subjects = subjects
        self._keys: dict[str, DataKey | None] = {}

    async def open(self, sealed: bytes, subject_id: str, *context: str) -> str | None:
        """The text in plain; None if the subject was erased."""
        key = await self._key(subject_id)
        return key.open(sealed, self._tenant_id, subject_id, *context) if key else None

    async def has_key(self, subject_id: str) -> bool:
        """False if the subject was erased."""
        return await self._key(subject_id) is not None

    async def key(self, subject_id: str) -> DataKey:
        """Raises Erased."""
        if (key := await self._key(subject_id)) is None:
            raise Erased(f"subject {subject_id} was erased")
        return key

    async def _key(self, subject_id: str) -> DataKey | None:
        if subject_id not in self._keys:
            try:
                self._keys[subject_id] = await self._subjects.key(self._tx, self._tenant_id, subject_id)
            except Erased:
                self._keys[subject_id] = None
        return self._keys[subject_id]


class StoredFile(msgspec.Struct, frozen=True):
    """A file for the person, in the object store."""

    path: str
    name: str


class ToolResult(msgspec.Struct, frozen=True):
    """The content of a tool's step, as it is sealed and stored."""

    result: str
    unknown: str | None = None
    """Why it is not known whether the tool took effect; None if it is known."""
    files: tuple[StoredFile, ...] = ()


async def seal_result(tx: Tx, subjects: SubjectKeys, run_id: UUID, step: int, result: object) -> bytes:
    """Seals a result that a person gives for a step, any JSON, as the content of that step."""
    [(tenant_id, subject_id)] = await tx.sql("SELECT tenant_id, subject_id FROM run WHERE id = $1", run_id)
    content = msgspec.json.encode(ToolResult(msgspec.json.encode(result).decode())).decode()
    try:
        key = await subjects.key(tx, tenant_id, subject_id)
    except Erased as error:
        raise Conflict(f"run {run_id}: the person was erased") from error
    return key.seal(content, tenant_id, subject_id, f"{run_id}/{step}", "content")
