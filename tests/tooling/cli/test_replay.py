"""`claw replay` of the services' own read models: the list, the rows that differ, the repair."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from typer.testing import CliRunner, Result

from infra.clock import utcnow, uuid7
from infra.postgres.schema import migrate, prepare_database
from infra.postgres.tx import Tx, derived_id
from infra.service import verification
from infra.service.verification import VerificationResult
from services.channel import projections
from services.channel.domain import MarkSent, QueueDelivery
from services.channel.events import DeliveryQueued, MessageTaken
from services.channel.publishing import CONVERSATION, DELIVERY
from services.log_aggregator.index.reindexing import INDEXED
from tooling.cli import app, read_models, replay
from tooling.stack import operator
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES
from tooling.testing.platform import PASSWORDS
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def prepared(database: str) -> str:
    await prepare_database(database, {name: PASSWORDS for name in SERVICES})
    for name in SERVICES:
        if (revisions := CHECKOUT / "services" / name / "migrations").exists():
            await migrate(database, name, revisions)
    return database


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: Stack, prepared: str) -> None:
    engines = {"postgres": {"url": prepared}, "kafka": {"bootstrap_servers": stack.kafka_bootstrap_servers}}
    (tmp_path / "credentials.json").write_text(json.dumps({"engines": engines}))
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")


def claw(*arguments: str) -> Result:
    return CliRunner().invoke(app.build(("replay",)), ["replay", *arguments])


def within(work: Callable[[Tx], Awaitable[Any]], service: str = "channel") -> Any:
    async def run() -> Any:
        url = operator.engines_access()["postgres"]["url"]
        async with operator.database(url, service) as database, database.begin(tenant_id="t") as tx:
            return await work(tx)

    return asyncio.run(run())


def query(statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
    found: Sequence[tuple[Any, ...]] = within(lambda tx: tx.sql(statement, *arguments))
    return found


def deliver(delivery_id: UUID) -> None:
    async def work(tx: Tx) -> None:
        for command in (QueueDelivery(DeliveryQueued(uuid7(), "s", None, "p", b"")), MarkSent(("v1", "v2"))):
            for event in await tx.decide(DELIVERY.stream(str(delivery_id)), command):
                await projections.project(tx, delivery_id, event)

    within(work)


def test_a_corrupted_row_is_found_and_repaired_and_the_list_shows_the_last_result() -> None:
    good, bad = uuid7(), uuid7()
    deliver(good)
    deliver(bad)
    assert claw("channel.deliveries").exit_code == 0
    query("UPDATE delivery SET state = 'read' WHERE id = $1", bad)

    found = claw("channel.deliveries")
    assert found.exit_code == 1
    assert f"{bad}: state" in found.stdout
    assert str(good) not in found.stdout
    assert "--switch" in found.stdout
    assert query("SELECT state FROM delivery WHERE id = $1", bad) == [("read",)]
    assert listed("channel.deliveries")["different"] == 1
    assert max(map(len, found.stdout.splitlines())) <= 80

    repaired = claw("channel.deliveries", "--switch", "--json")
    assert repaired.exit_code == 0
    result = msgspec.json.decode(repaired.stdout, type=VerificationResult)
    assert (result.different, result.repaired) == (1, 1)
    assert query("SELECT state FROM delivery WHERE id = $1", bad) == [("sent",)]
    last = listed("channel.deliveries")
    assert (last["rows"], last["different"]) == (last["compared"], 0)
    [*_, (body,)] = query("SELECT body FROM outbox WHERE destination = 'audit.logs' ORDER BY position")
    assert json.loads(body)["action"] == "projection.repair"


def listed(name: str) -> Any:
    [found] = [one for one in json.loads(claw("--list", "--json").stdout) if one["name"] == name]
    return found


def test_the_types_of_channels_are_rebuilt_from_the_events_of_the_channel_service() -> None:
    """As after the retention of the topic."""
    channel_id, event_id = uuid7(), uuid7()

    async def take(tx: Tx) -> None:
        fact = MessageTaken(channel_id, "telegram", uuid7(), "p", b"", utcnow())
        tx.append(CONVERSATION.stream("s1"), fact, event_id=event_id)
        await tx.sql("INSERT INTO conversation VALUES ('s1', 't', $1, 'p', 1)", channel_id)

    async def note(tx: Tx) -> None:
        # As the live consumer does with the message.
        await tx.sql("INSERT INTO inbox VALUES ($1, 'billing')", derived_id(event_id, "publication", 0))
        await tx.sql("INSERT INTO channel (channel_id, tenant_id, type) VALUES ($1, 't', 'telegram')", channel_id)

    async def change(tx: Tx) -> None:
        await tx.sql("UPDATE channel SET type = 'slack' WHERE channel_id = $1", channel_id)

    within(take)
    within(note, "billing")
    arguments = ("billing.note_channel_types", "--from-events", "channel")
    equal = claw(*arguments)
    assert equal.exit_code == 0, equal.output
    assert "channel: equal, live 1 rows, rebuilt 1" in equal.stdout
    within(change, "billing")
    different = claw(*arguments)
    assert different.exit_code == 1
    assert str(channel_id) in different.stdout
    assert listed("billing.note_channel_types")["different"] == 1
    assert claw(*arguments, "--switch").exit_code == 0
    assert claw(*arguments).exit_code == 0


def test_the_list_has_every_read_model_in_80_columns() -> None:
    lines = claw("--list").stdout.splitlines()
    names = {"billing.note_channel_types", *(f"log_aggregator.{one.name}" for one in INDEXED)}
    for service in SERVICES:
        models = import_module(f"services.{service}.__main__").service.read_models
        names |= {f"{service}.{model.name}" for model in models}
    assert {line.split()[0] for line in lines[1:]} == names
    assert max(map(len, lines)) <= 80
    assert listed("channel.deliveries")["source"] == "events"
    # Its documents were never counted: 0 would be a lie.
    assert listed(f"log_aggregator.{INDEXED[0].name}")["rows"] is None


def test_ctrl_c_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    deliver(uuid7())

    async def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(verification, "compare", interrupted)
        result = claw("channel.deliveries")
    assert result.exit_code == 130
    assert "The same command goes on" in result.stdout
    assert claw("channel.deliveries").exit_code == 0


def test_every_own_read_model_can_be_verified_on_an_empty_system() -> None:
    """Each statement is understood by the database."""
    for one in read_models.declared(map(replay.load, SERVICES)):
        if one.source in ("events", "rows"):
            result = claw(f"{one.service}.{one.name}")
            assert result.exit_code == 0, result.output
