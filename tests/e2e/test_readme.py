"""Runs the handler of the README unchanged, as a process on the real engines."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
from aiokafka import AIOKafkaProducer

from infra.bus import provisioning
from infra.clock import utcnow, uuid7
from infra.postgres.db import create_engine, sql
from infra.postgres.schema import prepare_database, role_url
from protos.catalog import AUDIT_LOGS, SERVICE_LOGS
from protos.envelope import Envelope
from protos.messages.sample import NoteTaken
from protos.topology import Catalog
from tests.infra.conftest import PASSWORDS
from tooling.testing import keys
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.stack import Stack

CHECKOUT = Path(__file__).parents[2]


async def test_the_readmes_handler_counts_each_note_once(
    stack: Stack, database: str, vhost: str, topic_prefix: str, tmp_path: Path
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (CHECKOUT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 24
    (tmp_path / "tally.py").write_text(code)
    await prepare_database(database, {"tally": PASSWORDS})
    owner = create_engine(role_url(database, "tally", "owner", PASSWORDS.owner), pool_size=1)
    async with owner.begin() as connection:
        await sql(connection, "CREATE TABLE tally (notebook text PRIMARY KEY, notes bigint NOT NULL)")
    await provisioning.apply(
        Catalog(topics=(SAMPLE_EVENTS, AUDIT_LOGS, SERVICE_LOGS), queues=()),
        kafka=stack.kafka_bootstrap_servers,
        rabbit_url=vhost,
        management_url=stack.rabbitmq_management_url,
        prefix=topic_prefix,
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "CLAW_DATABASE_URL": role_url(database, "tally", "worker", PASSWORDS.worker),
        "CLAW_REQUEST_DATABASE_URL": role_url(database, "tally", "request", PASSWORDS.request),
        "CLAW_KAFKA_BOOTSTRAP_SERVERS": stack.kafka_bootstrap_servers,
        "CLAW_TOPIC_PREFIX": topic_prefix,
        "CLAW_RABBITMQ_URL": vhost,
        "CLAW_REDIS_URL": stack.redis_url,
        "CLAW_HTTP_PORT": "0",
        **keys.environment("tally"),
    }
    await send(stack, topic_prefix, repeats=2)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, tmp_path / "tally.py"], env=environment, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(60):
            while not (rows := await tally(owner.url.render_as_string(hide_password=False))):
                assert process.poll() is None, (tmp_path / "log").read_text()
                await asyncio.sleep(0.1)
        assert rows == [("the readme's", 3)]
    finally:
        process.terminate()
        code_of_exit = await asyncio.to_thread(process.wait, 30)
        await owner.dispose()
    assert code_of_exit == 0, (tmp_path / "log").read_text()


async def send(stack: Stack, prefix: str, *, repeats: int) -> None:
    """Sends three notes, each `repeats` times."""
    producer = AIOKafkaProducer(bootstrap_servers=stack.kafka_bootstrap_servers)
    await producer.start()
    for number in range(1, 4):
        note = NoteTaken(notebook="the readme's", number=number, text="x")
        headers = Envelope(id=uuid7(), source="test", type=note.wire_name(), time=utcnow()).headers()
        for _ in range(repeats):
            await producer.send_and_wait(
                prefix + SAMPLE_EVENTS.name,
                msgspec.json.encode(note),
                key=note.notebook.encode(),
                headers=[(name, value.encode()) for name, value in headers.items()],
            )
    await producer.stop()


async def tally(url: str) -> list[tuple[str, int]]:
    """The rows of notebooks with at least three notes. A fourth would be a repeat that was counted."""
    engine = create_engine(url.replace("+asyncpg", ""), pool_size=1)
    try:
        async with engine.connect() as connection:
            rows = await sql(connection, "SELECT notebook, notes FROM tally WHERE notes >= 3")
    finally:
        await engine.dispose()
    return [(notebook, notes) for notebook, notes in rows]
