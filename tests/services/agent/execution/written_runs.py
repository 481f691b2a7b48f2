"""Queued runs in a real database, and the writes that a process makes for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import services.agent
from infra.clock import utcnow, uuid7
from infra.lanes.claims import Lease
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.outbox_rows import OutboxRow
from infra.postgres.schema import migrate, prepare_database, role_url
from protos.messages.billing import UsageRecorded
from services.agent.execution.group_write import Begun, Completion, EndedStep, GroupWriter, ReplyMessage, RunWrite, Used
from services.agent.lanes import RUNS, RunItem
from services.agent.models.contract import Usage
from services.agent.runs.events import MessagesTaken
from tests.infra.conftest import PASSWORDS

TENANT = "t"
WEEK = timedelta(days=7)
SAY = """
INSERT INTO message (tenant_id, message_id, session_key, seq, run_id, subject_id, text, received_at, decides)
SELECT $2, $3, session_key, (SELECT count(*) FROM message) + 1, id, 'p', '', now(), $4 FROM run WHERE id = $1
"""


@dataclass
class Runs:
    """Queued runs, each with one message and a claimed lane of its own."""

    database: Database
    writer: GroupWriter

    async def queued(self) -> tuple[UUID, Lease]:
        run_id = uuid7()
        session = f"s-{run_id}"
        async with self.database.begin(tenant_id=TENANT) as tx:
            await tx.sql(
                "INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id) VALUES ($1, $2, $3, $4, 'p')",
                run_id,
                TENANT,
                session,
                uuid7(),
            )
            tx.enqueue(RUNS, lane=session, item=RunItem(run_id), item_id=run_id)
        await self.say(run_id)
        [(lane_id, epoch)] = await self.rows(
            "UPDATE lane SET owner = $1, epoch = epoch + 1 WHERE lane = $2 RETURNING lane_id, epoch", uuid7(), session
        )
        return run_id, Lease(RUNS.name, TENANT, session, lane_id, epoch, until=1e18)

    async def say(self, run_id: UUID, *, decides: bool = False) -> None:
        await self.rows(SAY, run_id, TENANT, uuid7(), decides)

    def write(self, run_id: UUID, lease: Lease, *, version: int = 0, events: int = 1, **more: object) -> RunWrite:
        """A write with so many events, each with one message for the outbox."""
        out = self.database.collector(TENANT)
        write = RunWrite(lease, run_id, TENANT, version, out, **more)  # type: ignore[arg-type]
        for n in range(version + 1, version + events + 1):
            write.events.append((uuid7(), MessagesTaken(n=n, session_key=lease.lane, step=n, messages=1)))
        return write

    async def commit(self, *writes: RunWrite) -> list[BaseException | None]:
        """Submits the writes as one group. Returns the error of each."""
        return await asyncio.gather(*(self.writer.submit(write) for write in writes), return_exceptions=True)

    async def rows(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self.database.autocommit(statement, *arguments)]

    def completion(self, run_id: UUID, lease: Lease) -> Completion:
        """The end of the run, with a reply to its conversation."""
        headers, body = '{"ce_id":"x","ce_sequence":"0"}', b'{"text":"Hi","position":0}'
        row = OutboxRow("rabbit", uuid7(), "channel.outbound", "r", str(run_id), headers, body, WEEK)
        return Completion(1, True, b"sealed", None, ReplyMessage(uuid7(), lease.lane, row))

    def with_every_part(self, run_id: UUID, lease: Lease, *, version: int) -> RunWrite:
        """Begins a second step, ends the first one, records usage, ends the run."""
        write = self.write(run_id, lease, version=version, begins=True, expected_messages=1)
        write.started_model = "other"
        write.begun.append(Begun(2, "model", "m", 1, "span"))
        write.ended.append(EndedStep(1, "completed", 7, None))
        write.used.append(used(f"u-{run_id}", Usage(input_tokens=3, output_tokens=2)))
        write.out._rows.append(OutboxRow("kafka", uuid7(), "topic", "", str(run_id), "{}", b"{}", WEEK))
        write.completion = self.completion(run_id, lease)
        return write

    async def until_it_waits(self, write: asyncio.Future[None]) -> None:
        """Returns when the write waits for another transaction, or is over."""
        async with asyncio.timeout(30):
            while not write.done() and not await self.rows(
                "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
            ):
                await asyncio.sleep(0.02)

    async def versions(self, run_id: UUID) -> list[object]:
        rows = await self.rows("SELECT version FROM event WHERE stream_id = $1 ORDER BY position", f"run:{run_id}")
        return [version for (version,) in rows]


def used(usage_id: str, usage: Usage) -> Used:
    record = UsageRecorded(
        tenant_id=TENANT, usage_id=usage_id, resource="m", quantities={"calls": 1}, occurred_at=utcnow()
    )
    return Used(record, usage)


@asynccontextmanager
async def written_runs(database: str) -> AsyncIterator[Runs]:
    """`database`: URL of an empty database."""
    await prepare_database(database, {"agent": PASSWORDS})
    await migrate(database, "agent", Path(str(services.agent.__file__)).parent / "migrations")
    engine = create_engine(role_url(database, "agent", "worker", PASSWORDS.worker))
    worker = Database(engine, "agent")
    yield Runs(worker, GroupWriter(worker))
    await engine.dispose()
