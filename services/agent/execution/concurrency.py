"""Limits on how many runs are executed at the same time: per agent, and per model at its provider."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from infra.errors import NotYet
from infra.postgres.tx import Tx
from services.agent.definitions.models import NewAgent

SHORTEST_PAUSE, LONGEST_PAUSE = timedelta(seconds=0.5), timedelta(seconds=30)


def model_of(definition: NewAgent) -> str:
    """The name under which runs with this model at this provider are counted."""
    provider = definition.provider
    return f"{definition.model} {(provider.base_url if provider else None) or ''}".rstrip()


def has_limits(definition: NewAgent) -> bool:
    """True if a run of this agent may have to wait for a place."""
    return definition.concurrency is not None or definition.model_concurrency is not None


async def take_place(tx: Tx, run_id: UUID, agent_id: UUID, definition: NewAgent) -> None:
    """Takes a place for a run that is about to start; its row is locked. Raises NotYet if all places are taken."""
    limits = {
        ("agent_id", str(agent_id)): definition.concurrency,
        ("model", model_of(definition)): definition.model_concurrency,
    }
    for (column, value), most in limits.items():
        if most is None:
            continue
        # One transaction counts at a time, so that two runs cannot take the same place.
        await tx.take_turn(f"run {tx.tenant_id} {column} {value}")
        [(under_way,)] = await tx.sql(
            f"SELECT count(*) FROM run WHERE tenant_id = $1 AND status = 'running' AND {column}::text = $2",
            tx.tenant_id,
            value,
        )
        if under_way >= most:
            raise NotYet(
                await _pause(tx, run_id, most), f"{under_way} runs are running, and no more may run at the same time"
            )


async def _pause(tx: Tx, run_id: UUID, places: int) -> timedelta:
    """Longer the more runs wait before it: of many waiting runs only the next ones look often."""
    [(ahead,)] = await tx.sql(
        """
        SELECT count(*)
        FROM run r JOIN run o
            ON o.tenant_id = r.tenant_id AND o.status = 'queued' AND o.created_at < r.created_at
        WHERE r.id = $1
        """,
        run_id,
    )
    return min(max(timedelta(seconds=ahead / places), SHORTEST_PAUSE), LONGEST_PAUSE)
