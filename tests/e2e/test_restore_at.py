"""A running system is restored to the moment before a mistake, in place, from its last backup and its archived WAL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from infra.clock import utcnow
from tests.e2e.test_main_job import Company
from tooling.stack.backup import wal
from tooling.stack.backup.database import archive_now
from tooling.stack.backup.take import known_archive
from tooling.testing.model_server import ModelServer, Says
from tooling.testing.stack import Stack, private_home, run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import WebhookStandIn

# The stack's own object store: a restore in place keeps it.
ARCHIVE = "s3://wal"


@pytest.fixture
def archived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A system of its own whose WAL is archived."""
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(tmp_path / "backup.key"))
    with private_home() as home:
        run_claw(home, "up", "--archive", ARCHIVE)
        yield System.at(home)


async def answered(company: Company, system: System, vendor: WebhookStandIn, path: str, text: str) -> dict[str, Any]:
    """Sends a message, and returns its run after it is billed."""
    count = len(vendor.ledger)
    body, headers = vendor.message(text, conversation="c1")
    async with system.client() as client:
        assert (await client.post(path, content=body, headers=headers)).status_code == 200

    async def replied() -> bool:
        return len(vendor.ledger) > count

    async def billed() -> dict[str, Any] | None:
        [run, *_] = (await company.get("/api/v1/runs", limit=1))["items"]
        return run if run["status"] == "completed" and run["cost_nanos"] is not None else None

    await until(replied)
    return await until(billed)


@pytest.mark.timeout(900)
async def test_a_system_is_restored_to_the_moment_before_a_mistake(
    archived: System, models: ModelServer, tmp_path: Path
) -> None:
    system, stack = archived, Stack(archived.home)
    models.script("gpt-4o-mini", *[Says("Yes.", usage=(200, 0, 12, 0)) for _ in range(4)])
    async with WebhookStandIn() as vendor, system.client(await system.tenant("Norrland")) as api:
        company = Company(api)
        path = await company.channel("webhook", await company.agent(models), vendor)
        first = await answered(company, system, vendor, path, "Before the backup?")
        taken = json.loads(run_claw(system.home, "backup", "--to", str(tmp_path), "--json"))
        assert taken["manifest"]["archive"] == ARCHIVE

        second = await answered(company, system, vendor, path, "After the backup?")
        upload = {"file": ("care.md", b"# Care\n\nThe boiler is descaled every 77 days.\n", "text/markdown")}
        document = (await api.post("/api/v1/documents", files=upload)).json()["id"]
        await until(lambda: indexed(company, document))
        before = {"runs": await company.all("/api/v1/runs"), "ledger": await company.all("/api/v1/billing/ledger")}
        moment = utcnow().isoformat()
        database = await asyncpg.connect(stack.postgres_url)
        await database.execute("TRUNCATE billing.ledger_entry, agent.run CASCADE")
        await database.close()

        # A damaged archive is found before anything is changed.
        archive = known_archive(system.home)
        assert archive
        number = wal.system_of(system.home / "postgres" / "data")
        # The backup has the WAL of its own time; this segment is newer.
        await archive_now(stack.postgres_url)
        last = wal.segments(archive, number)[-1]
        content = wal.pull(archive, number, last)
        assert content
        archive.of(number).remove(last)
        with pytest.raises(RuntimeError, match=f"{last} of the WAL is missing.*Nothing was changed"):
            run_claw(system.home, "restore", taken["file"], "--at", moment, "--wipe")
        assert (await company.get("/api/v1/documents"))["items"]
        wal.push(archive, number, last, content)

        done = json.loads(run_claw(system.home, "restore", taken["file"], "--at", moment, "--wipe", "--json"))
        assert done["at"].startswith(moment[:19])
        assert done["messages"] > 0
        assert await company.all("/api/v1/runs") == before["runs"]
        assert {run["id"] for run in before["runs"]} == {first["id"], second["id"]}
        assert await company.all("/api/v1/billing/ledger") == before["ledger"]
        link = await company.get(f"/api/v1/documents/{document}/content")
        async with system.client() as reader:
            assert b"every 77 days" in (await reader.get(link["url"])).content
        assert (await company.get("/api/v1/audit/verify"))["ok"]

        async def balanced() -> bool:
            sums = await company.get("/api/v1/billing/reconciliation")
            done = sums["counted"] + sums["duplicate"] + sums["rejected"] + sums["held"]
            return bool(sums["produced"] == done and sums["difference"] == 0)

        await until(balanced)
        # All messages came again from the outboxes, and none was answered twice.
        await answered(company, system, vendor, path, "And now?")
        assert len(vendor.ledger) == 3
        assert vendor.refusals == []
        # The archive goes on, on a timeline of its own.
        await until(lambda: archived_on(archive, number, "00000002"))
        parts = json.loads(run_claw(system.home, "status", "--json"))
        assert {part["problem"] for part in parts} == {None}
        [billing] = [part["address"] for part in parts if part["name"] == "billing"]
        async with system.client() as prometheus:
            metrics = (await prometheus.get(f"http://{billing}/metrics")).text
        [age] = re.findall(r"^claw_wal_archived_age_seconds (\S+)$", metrics, re.MULTILINE)
        assert 0 < float(age) < 600


async def indexed(company: Company, document: str) -> bool | None:
    return (await company.get(f"/api/v1/documents/{document}"))["status"] == "indexed" or None


async def archived_on(archive: wal.Archive, number: int, timeline: str) -> bool:
    return any(name.startswith(timeline) for name in wal.segments(archive, number))
