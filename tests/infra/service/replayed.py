"""A program that replays the sample's ledger from Kafka, for a test to kill."""

from __future__ import annotations

import asyncio
import sys

from infra.postgres.db import create_engine
from infra.service import replay
from infra.service.replay import Replay
from tests.infra.service.conftest import ledger_subscription


async def main(url: str, kafka: str, prefix: str) -> None:
    # Small batches, so that the second one is not the last.
    replay.BATCH = 3
    engine = create_engine(url, schema="sample_ledger")
    rebuild = Replay(engine, "sample_ledger", ledger_subscription(), lambda done, total: None)
    await rebuild.from_kafka(kafka, prefix=prefix)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
