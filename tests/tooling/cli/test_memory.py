"""``./claw memory rebuild`` compares the memories with their events, and corrects the rows that differ."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from infra.clock import uuid7
from infra.postgres.schema import migrate, prepare_database
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.memory.keeping import Keeping, New
from tooling.cli import app
from tooling.stack import operator
from tooling.stack.checkout import CHECKOUT
from tooling.testing.platform import PASSWORDS


@pytest.fixture(scope="module")
async def prepared(database: str) -> str:
    await prepare_database(database, {"memory": PASSWORDS})
    await migrate(database, "memory", CHECKOUT / "services/memory/migrations")
    return database


def rebuild(*arguments: str) -> tuple[int, dict[str, Any]]:
    found = CliRunner().invoke(app.build(("memory",)), ["memory", "rebuild", "--json", *arguments])
    return found.exit_code, json.loads(found.stdout)


def test_rows_that_differ_from_their_events_are_found_and_corrected(
    prepared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "credentials.json").write_text(json.dumps({"engines": {"postgres": {"url": prepared}}}))
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))

    async def spoil(tx: Tx) -> None:
        await tx.sql("UPDATE memory SET importance = 1")

    async def learn(tx: Tx) -> None:
        new = New(
            id=uuid7(),
            scope="tenant",
            scope_id="",
            subject_id="",
            text="We sell lamps.",
            kind="fact",
            topic=None,
            importance=5,
            confidence=1.0,
            speaker="client",
            at=datetime(2026, 11, 1, tzinfo=UTC),
        )
        await Keeping(SubjectKeys(Cipher("m" * 43 + "="))).learn(tx, new)

    async def within(work: Any) -> None:
        async with operator.database(prepared, "memory") as database, database.begin(tenant_id="t") as tx:
            await work(tx)

    asyncio.run(within(learn))
    assert rebuild()[0] == 0
    asyncio.run(within(spoil))
    code, found = rebuild()
    assert (code, found["live"], found["rebuilt"], found["different"]) == (1, 1, 1, 1)
    assert found["live_hash"] != found["rebuilt_hash"]
    assert rebuild("--apply")[0] == 0
    assert rebuild()[0] == 0
