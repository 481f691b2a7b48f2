"""The usage records of a run: how they are stored, and the seconds for which the run is charged."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.postgres.tx import Tx, derived_id
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from protos.messages.channel import Sender
from services.agent.runs.domain import Run
from services.agent.runs.publishing import stream

RESOURCE = "agent/run"


def seconds_hold(run_id: UUID) -> UUID:
    """The id of the hold for the seconds of a run. It follows from the run alone, so the record can name it."""
    return derived_id(run_id, "seconds")


class UsageOrigin(NamedTuple):
    """The source of a run's usage: the groups of its records in reports, and the scopes of budgets."""

    run_id: UUID
    tenant_id: str
    agent_id: UUID
    channel_id: UUID | None
    """None: the run came by the API."""
    session_key: str
    subject_id: str
    """The person of a chat, or the client of the API: ``api_key:<id>`` or ``member:<id>``."""
    tag: str
    """The agent's; empty: it has none."""

    @property
    def api_key_id(self) -> str:
        """Empty: no API key, or the key of a member."""
        return self._client("api_key")

    @property
    def member_id(self) -> UUID | None:
        id_ = self._client("member")
        return UUID(id_) if id_ else None

    def _client(self, wanted: str) -> str:
        """The id of the client of the API; empty if it is of another kind, or a person of a chat."""
        kind, _, id_ = self.subject_id.partition(":")
        return id_ if self.channel_id is None and kind == wanted else ""

    @property
    def sender(self) -> Sender:
        """Of the messages of a run that came from a channel, so of no client."""
        return Sender(agent_id=self.agent_id, tag=self.tag)

    def record(
        self,
        usage_id: str,
        resource: str,
        quantities: dict[str, int],
        hold_id: UUID | None,
        *,
        estimated: bool = False,
    ) -> UsageRecorded:
        return UsageRecorded(
            tenant_id=self.tenant_id,
            usage_id=usage_id,
            resource=resource,
            quantities=quantities,
            occurred_at=utcnow(),
            estimated=estimated,
            run_id=self.run_id,
            hold_id=hold_id,
            agent_id=self.agent_id,
            channel_id=self.channel_id,
            session_key=self.session_key,
            api_key_id=self.api_key_id or None,
            member_id=self.member_id,
            tag=self.tag or None,
        )


def seconds_used(state: Run, origin: UsageOrigin) -> UsageRecorded | None:
    """The record of the seconds in which the run's steps were made; a begun second counts. None if there was no step.

    A run ends once, so the id follows from the run alone.
    """
    if not state.busy_ms:
        return None
    seconds = {"run_seconds": -(-state.busy_ms // 1000)}
    return origin.record(f"{origin.run_id}/seconds", RESOURCE, seconds, seconds_hold(origin.run_id))


async def origin_of(tx: Tx, run_id: UUID) -> UsageOrigin:
    """The source of a run's usage, with the tag that its agent has now."""
    [row] = await tx.sql(
        """
        SELECT r.id, r.tenant_id, r.agent_id, r.channel_id, r.session_key, r.subject_id,
               coalesce(v.definition::jsonb ->> 'tag', '')
        FROM run AS r
        LEFT JOIN agent AS a ON a.id = r.agent_id
        LEFT JOIN agent_version AS v ON v.agent_id = a.id AND v.version = a.version
        WHERE r.id = $1
        """,
        run_id,
    )
    return UsageOrigin(*row)


async def record_seconds(tx: Tx, run_id: UUID) -> None:
    """Records the seconds of a run, in the transaction of its end."""
    if record := seconds_used(await tx.load(stream(run_id)), await origin_of(tx, run_id)):
        await store_usage(tx, run_id, record)


async def store_usage(tx: Tx, run_id: UUID, record: UsageRecorded) -> None:
    """Publishes the record and keeps it as one of the run's, so the run's cost is known when billing has rated it."""
    tx.publish(USAGE_RECORDS, record, key=record.tenant_id)
    await tx.sql(
        """
        INSERT INTO run_usage (tenant_id, run_id, usage_id, resource, quantities, estimated, occurred_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7)
        ON CONFLICT DO NOTHING
        """,
        record.tenant_id,
        run_id,
        record.usage_id,
        record.resource,
        msgspec.json.encode(record.quantities).decode(),
        record.estimated,
        record.occurred_at,
    )
