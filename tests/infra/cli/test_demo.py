"""The demo's story on the suite's engines, as a person and as a program see it, and how it fails."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
from rich.console import Console
from sqlalchemy.engine import make_url

from infra.cli import app as cli
from infra.cli import demo
from infra.cli.demo import prepare_corner
from infra.engines.base import Place
from infra.schema import Passwords
from infra.testing.sample.run import Engines, SampleServices
from infra.testing.sample.story import play
from infra.testing.stack import Stack
from tests.infra.conftest import PASSWORDS

Claw = Callable[..., int]


@pytest.fixture
def claw(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Claw:
    """Runs ``claw demo`` in the module's corner of the engines; returns the exit code."""

    async def in_corner(place: Place, passwords: Passwords, console: Console, began: float) -> dict[str, Any]:
        engines = Engines(
            database, stack.kafka_bootstrap_servers, vhost, stack.rabbitmq_management_url, stack.redis_url
        )
        return await play(engines, tmp_path, PASSWORDS, topic_prefix, console, began)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["claw", "demo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    monkeypatch.setenv("CLAW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli, "leave_root", lambda: None)
    monkeypatch.setattr(demo, "up", lambda only: None)
    monkeypatch.setattr(demo, "_in_corner", in_corner)
    return run


def test_the_story_holds_and_a_program_reads_one_line(claw: Claw, capsys: pytest.CaptureFixture[str]) -> None:
    code = claw("--json")
    printed = capsys.readouterr()
    assert code == 0, printed.err
    [line] = printed.out.splitlines()
    result = json.loads(line)
    seconds = result.pop("seconds")
    assert seconds["setup"] > 0 < seconds["answer"]
    assert len(result.pop("trace_id")) == 32
    assert result == {
        "delivered": True,
        "trace": {"services": ["sample_desk", "sample_front", "sample_ledger"], "spans": 7},
        "duplicates": {"sent": 1, "effects": 1},
        "crash": {"killed": "sample_desk", "effects": 1},
    }
    story = printed.err
    assert "notes 1 · events in the store 1 · Kafka records of the key 1 · effects 1" in story
    assert "died of signal 9; event 2 is stored" in story
    assert "notes 2 · events in the store 2" in story
    assert "POST /notes" in story
    assert "./claw status" in story
    assert max(map(len, story.splitlines())) <= 80


def test_a_service_that_does_not_start_ends_it_with_the_reason(
    claw: Claw, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = SampleServices.url
    seen: list[SampleServices] = []

    def bad_for_the_ledger(self: SampleServices, service: str, role: str = "worker") -> str:
        seen.append(self)
        return "" if service == "ledger" else url(self, service, role)

    monkeypatch.setattr(SampleServices, "url", bad_for_the_ledger)
    code = claw()
    printed = capsys.readouterr()
    assert code == 1
    assert "claw: the demo failed: ledger did not become ready" in printed.err
    assert "CLAW_DATABASE_URL" in printed.err
    assert all(process.poll() is not None for process in seen[0].processes.values())


async def test_the_corner_is_made_once_and_found_again(stack: Stack) -> None:
    name = f"t_{uuid.uuid4().hex}"
    access = {**stack.engines, "valkey": stack.engines["redis"]}
    url = make_url(stack.postgres_url)
    try:
        first = await prepare_corner(access, name)
        assert await prepare_corner(access, name) == first
        connection = await asyncpg.connect(first.postgres)
        assert await connection.fetchval("SELECT current_database()") == name
        await connection.close()
        assert first.rabbitmq.endswith(f"/{name}")
    finally:
        connection = await asyncpg.connect(url.render_as_string(hide_password=False))
        await connection.execute(f"DROP DATABASE IF EXISTS {name}")
        await connection.close()
        await asyncio.to_thread(httpx.delete, f"{stack.rabbitmq_management_url}/api/vhosts/{name}")
