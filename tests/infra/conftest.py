"""The sample's database, one per test module."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import Passwords, migrate, prepare_database, role_url
from infra.security.crypto import Cipher
from infra.security.sealed_letters import SealedLetters
from tooling.testing.sample import ledger

CIPHER = Cipher(base64.b64encode(bytes(32)).decode())
PASSWORDS = Passwords("owner-pw", "request-pw", "worker-pw")


@dataclass
class SampleDatabase:
    """The schemas of the sample's services in the module's own database."""

    admin_url: str

    async def prepare(self) -> None:
        await prepare_database(self.admin_url, {f"sample_{n}": PASSWORDS for n in ("front", "desk", "ledger")})
        await migrate(self.admin_url, "sample_ledger", Path(str(ledger.__file__)).parent / "migrations")

    def url(self, service: str, role: str) -> str:
        return role_url(self.admin_url, f"sample_{service}", role, getattr(PASSWORDS, role))


@pytest.fixture(scope="module")
async def sample(database: str) -> SampleDatabase:
    found = SampleDatabase(database)
    await found.prepare()
    return found


@pytest.fixture(scope="module")
async def desk(sample: SampleDatabase) -> AsyncIterator[Database]:
    engine = create_engine(sample.url("desk", "worker"))
    yield Database(engine, "sample_desk", sealing=SealedLetters(CIPHER))
    await engine.dispose()


@pytest.fixture(scope="module")
async def ledger_database(sample: SampleDatabase) -> AsyncIterator[Database]:
    engine = create_engine(sample.url("ledger", "worker"))
    yield Database(engine, "sample_ledger", sealing=SealedLetters(CIPHER))
    await engine.dispose()
