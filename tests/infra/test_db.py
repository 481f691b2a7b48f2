"""What the database does with sessions whose process does nothing more."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from infra import db
from tests.infra.conftest import SampleDatabase


async def test_a_transaction_that_lasts_too_long_is_ended_by_the_server(
    sample: SampleDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "TRANSACTION_TIMEOUT_MS", 300)
    engine = db.create_engine(sample.url("desk", "worker"), pool_size=1)
    with pytest.raises(DBAPIError) as ended:
        async with engine.begin() as connection:
            await db.sql(connection, "SELECT pg_sleep(60)")
    await engine.dispose()
    # Its connection is gone, and with it its locks; a statement that takes too long leaves both.
    assert ended.value.connection_invalidated
    assert db.is_transient(ended.value)
