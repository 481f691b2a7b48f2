"""How many runs go on at once: of an agent, and with a model at its provider."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from infra.errors import NotYet
from infra.postgres.tx import Tx
from services.agent.definitions.models import NewAgent

SHORTEST_PAUSE, LONGEST_PAUSE = timedelta(seconds=0.5), timedelta(seconds=30)


def model_of(definition: NewAgent) -> str:
    """What runs are counted by: the model at its provider."""
    provider = definition.provider
    return f"{definition.model} {(provider.base_url if provider else None) or ''}".rstrip()


async def take_place(tx: Tx, run_id: UUID, agent_id: UUID, definition: NewAgent) -> None:
    """Of a run that is about to begin, whose row is locked. Raises NotYet where as many go on as may."""
    limits = {
        ("agent_id", str(agent_id)): definition.concurrency,
        ("model", model_of(definition)): definition.model_concurrency,
    }
    for (column, value), most in limits.items():
        if most is None:
            continue
        # Whoever counts sees all that have counted before: two must not take the same place.
        await tx.sql("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"run {tx.tenant_id} {column} {value}")
        [(under_way,)] = await tx.sql(
            f"SELECT count(*) FROM run WHERE tenant_id = $1 AND status = 'running' AND {column}::text = $2",
            tx.tenant_id,
            value,
        )
        if under_way >= most:
            raise NotYet(await _pause(tx, run_id, most), f"{under_way} runs go on already, and no more may at once")


async def _pause(tx: Tx, run_id: UUID, places: int) -> timedelta:
    """The longer, the more wait before it: however many wait, only the next ones look every moment."""
    [(ahead,)] = await tx.sql(
        "SELECT count(*) FROM run r JOIN run o ON o.tenant_id = r.tenant_id AND o.status = 'queued' "
        "AND o.created_at < r.created_at WHERE r.id = $1",
        run_id,
    )
    return min(max(timedelta(seconds=ahead / places), SHORTEST_PAUSE), LONGEST_PAUSE)
