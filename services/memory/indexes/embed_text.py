"""Embeds one reply or memory, once, and records its usage."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from infra.errors import EffectFailed, Transient, Unanswered
from infra.lanes.effects import Effects, Outcome
from infra.postgres.tx import Tx
from services.memory.indexes.embeddings import Embedded, Embedder
from services.memory.indexes.models import EmbeddingModels
from services.memory.indexes.vectors import store
from services.memory.metering.credit import Credit
from services.memory.metering.usage import UseSource, record_usage

_OWNERS = {"utterance": "conversation", "memory": "memory"}


async def embed_text(
    effects: Effects,
    models: EmbeddingModels,
    model: Embedder,
    table: Literal["utterance", "memory"],
    id_: UUID,
    text: str,
    tenant_id: str,
    origin: UseSource,
    credit: Credit | None,
) -> bytes:
    """Embeds the text by the model and stores its vector in the row `id_` of `table`. Returns the vector (float32).

    credit: held before, if the model is paid. Raises EffectFailed if the endpoint refuses the text, or the credit does
    not suffice.
    """
    made: Embedded | None = None
    hold_id: UUID | None = None

    async def call(_: str) -> int:
        nonlocal made, hold_id
        # The tenant did not ask for this work, so it is billed only if the platform pays for it.
        if model.paid and credit:
            hold_id = await credit.hold_embedding(tenant_id, id_, model.model, [text], origin)
        try:
            made = await model.passages([text])
        except Unanswered as error:
            raise Transient(str(error)) from error
        return made.tokens

    async def keep(tx: Tx, outcome: Outcome[int]) -> None:
        if made is None or outcome.result is None:
            return
        kept = await models.keep(tx, model.key)
        await store(tx, table, model.key, kept, {id_: made.vectors[0].tobytes()})
        if model.paid:
            usage_id = f"{_OWNERS[table]}/{effects.item_id}/{model.key}/{outcome.attempt}"
            record_usage(tx, model.model, usage_id, outcome.result, origin, hold_id)

    key = f"embed/{effects.item_id}/{model.key}"
    outcome = await effects.run(key, call, kind="repeatable", result=int, after=keep)
    if made is None:
        raise EffectFailed(str(outcome.error))
    vector: bytes = made.vectors[0].tobytes()
    return vector
