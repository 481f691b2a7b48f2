"""The table of agents' replies, kept per session for 30 days and searched only on request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import numpy as np

from infra.clock import utcnow
from infra.errors import EffectFailed
from infra.lanes.effects import Effects
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from infra.security.subjects import Erased, SubjectKeys
from services.memory.indexes import vectors
from services.memory.indexes.embed_text import embed_text
from services.memory.indexes.embeddings import Embedder
from services.memory.indexes.engines import Engines
from services.memory.indexes.index import VectorRow
from services.memory.indexes.models import EmbeddingModels
from services.memory.metering.credit import Credit
from services.memory.metering.usage import of_client
from services.memory.readable import Found

# Within this time a reply is erased with its person. Replies from before their events named the person only expire.
KEEP = timedelta(days=30)
_PURPOSE = "conversation memory"
SEALED = SealedColumn("utterance", "sealed", _PURPOSE, ("tenant_id", "run_id::text"), where="subject_id = ''")


def session_scope(session_key: str) -> str:
    """The index's scope for the replies of a session."""
    return f"conversation {session_key}"


class Conversations:
    def __init__(self, cipher: Cipher, models: EmbeddingModels, index: Engines, credit: Credit) -> None:
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)
        self._models = models
        self._index = index
        self._credit = credit

    async def add(self, tx: Tx, run_id: UUID, session_key: str, subject_id: str, text: str) -> bool:
        """Returns False if the run's reply is stored already, or if its person was erased."""
        tenant_id = str(tx.tenant_id)
        if subject_id:
            try:
                key = await self._subjects.key(tx, tenant_id, subject_id)
            except Erased:
                return False
            sealed = key.seal(text, tenant_id, subject_id, str(run_id), "reply")
        else:
            sealed = self._cipher.seal(text, _PURPOSE, tenant_id, str(run_id))
        return bool(
            await tx.sql(
                """
                INSERT INTO utterance (run_id, tenant_id, session_key, subject_id, sealed, expires_at)
                VALUES ($1, $2, $3, $4, $5, $6)
                ON CONFLICT DO NOTHING
                RETURNING run_id
                """,
                run_id,
                tenant_id,
                session_key,
                subject_id,
                sealed,
                utcnow() + KEEP,
            )
        )

    async def erase(self, tx: Tx, subject_id: str) -> list[UUID]:
        """Deletes the replies to a person from the table. Returns their runs, whose vectors are still in the index."""
        rows = await tx.sql(
            "DELETE FROM utterance WHERE tenant_id = $1 AND subject_id = $2 RETURNING run_id",
            tx.tenant_id,
            subject_id,
        )
        return [run_id for (run_id,) in rows]

    async def embed(self, run_id: UUID, effects: Effects, tx: Tx) -> None:
        """Embeds the reply and puts it into the index."""
        active = await self._models.active()
        with suppress(EffectFailed):
            await self._fill(run_id, active, effects, self._credit)
        await self._models.by_target(lambda target: self._fill(run_id, target, effects))
        await self._models.hold(tx, active.key)

    async def _fill(self, run_id: UUID, model: Embedder, effects: Effects, credit: Credit | None = None) -> None:
        """Embeds the reply by the model if it was not, and puts it into the model's index. credit: for a paid model.

        Raises EffectFailed if the embedding endpoint refuses the text, or the credit does not suffice.
        """
        async with effects.begin() as begun:
            tenant_id = str(begun.tenant_id)
            rows = await begun.sql(
                f"""
                SELECT session_key, subject_id, sealed, {vectors.of("$2", "u")}, indexed_in
                FROM utterance u
                WHERE run_id = $1
                """,
                run_id,
                model.key,
            )
            if not rows:
                return
            [(session_key, subject_id, sealed, vector, inside)] = rows
            text = (await self._texts(begun, tenant_id, [(run_id, subject_id, sealed)])).get(run_id)
        if text is None:
            return
        if vector is None:
            origin = of_client(subject_id, session_key=session_key)
            vector = await embed_text(
                effects, self._models, model, "utterance", run_id, text, tenant_id, origin, credit
            )
        row = VectorRow(run_id, np.frombuffer(vector, dtype="<f4").tolist())
        filled = await self._index.replace(
            model.key, tenant_id, run_id, session_scope(session_key), lambda: _one(row), inside
        )
        async with effects.begin() as begun:
            await begun.sql(
                """
                UPDATE utterance
                SET indexed_in = ARRAY(SELECT unnest(indexed_in) UNION SELECT unnest($2::text[]) ORDER BY 1)
                WHERE run_id = $1
                """,
                run_id,
                filled.names,
            )
        if filled.error:
            raise filled.error

    async def forget(self, run_id: UUID, effects: Effects, tx: Tx) -> None:
        """Removes the reply from the index and from the table."""
        async with effects.begin() as begun:
            tenant_id = str(begun.tenant_id)
        await self._index.remove(tenant_id, run_id)
        await tx.sql("DELETE FROM utterance WHERE run_id = $1", run_id)

    async def found(self, tx: Tx, ids: Sequence[UUID], session_key: str) -> Mapping[UUID, Found]:
        """The replies with these ids that belong to the session and have not expired."""
        rows = await tx.sql(
            """
            SELECT run_id, subject_id, sealed FROM utterance WHERE run_id = ANY($1::uuid[]) AND session_key = $2
            AND expires_at > clock_timestamp()
            """,
            list(ids),
            session_key,
        )
        texts = await self._texts(tx, str(tx.tenant_id), rows)
        return {run_id: Found(text, None, "conversation", None, None, None) for run_id, text in texts.items()}

    async def _texts(self, tx: Tx, tenant_id: str, rows: Sequence[tuple[Any, ...]]) -> dict[UUID, str]:
        """Opens rows of run id, subject id and sealed text. Leaves out those of erased persons."""
        keys = await self._subjects.keys(tx, {(tenant_id, subject_id) for _, subject_id, _ in rows if subject_id})
        texts: dict[UUID, str] = {}
        for run_id, subject_id, sealed in rows:
            if not subject_id:
                texts[run_id] = self._cipher.open(sealed, _PURPOSE, tenant_id, str(run_id)).decode()
            elif key := keys[tenant_id, subject_id]:
                texts[run_id] = key.open(sealed, tenant_id, subject_id, str(run_id), "reply")
        return texts


async def _one(row: VectorRow) -> AsyncIterator[Sequence[VectorRow]]:
    yield [row]
