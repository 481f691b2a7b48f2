"""``reserve``: holds for one tenant's credit and budget, with 1, 8 and 64 callers. Each hold is closed by a release.

The callers share one account on purpose: holds of one tenant take turns, so this is the worst case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import services.billing
from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from services.billing.credit import accounts, budgets, holds
from tooling.bench.fixture import Fixture
from tooling.bench.protocol import SLICE_SECONDS, Units
from tooling.testing.platform import PASSWORDS

SERVICE = "billing"
CALLERS = (1, 8, 64)
TENANT = "bench"


async def prepare(place: Fixture) -> Database:
    """Makes the service's schema. Returns a database of its worker role."""
    await prepare_database(place.admin_url, {SERVICE: PASSWORDS})
    await migrate(place.admin_url, SERVICE, Path(str(services.billing.__file__)).parent / "migrations")
    return Database(create_engine(role_url(place.admin_url, SERVICE, "worker", PASSWORDS.worker)), SERVICE)


async def measure(place: Fixture, progress: Callable[[int, int], None]) -> list[Units]:
    database = await prepare(place)
    async with database.begin(tenant_id=TENANT) as tx:
        await accounts.open_account(tx, TENANT, "USD", 10**17)
        await budgets.set_budget(tx, TENANT, "agent", "a", "month", 10**17, [80])
    found = []
    for number, callers in enumerate(CALLERS):
        found.append(await _slice(database, callers))
        progress(number + 1, len(CALLERS))
    async with database.begin(tenant_id=TENANT) as tx:
        if await holds.open_nanos(tx, TENANT):
            raise ValueError("reserve: a hold is still open")
    await database.engine.dispose()
    return found


async def _slice(database: Database, callers: int) -> Units:
    served = holds.Holds(database)
    request = holds.HoldRequest("openai/gpt-4o-mini", {"input_tokens": 1000}, 60_000, agent_id="a")
    seconds: list[float] = []
    ends = perf_counter() + SLICE_SECONDS

    async def caller() -> None:
        while (began := perf_counter()) < ends:
            hold_id = uuid7()
            granted = (await served.reserve(TENANT, {hold_id: request}))[0].granted
            seconds.append(perf_counter() - began)
            if not granted:
                raise ValueError("reserve: a hold was refused")
            await served.release(TENANT, hold_id)

    began = perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    rate = len(seconds) / (perf_counter() - began)
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000
    return Units(
        bench="reserve",
        measure=f"p99 of a hold, {callers} callers",
        value=p99,
        unit="ms",
        goal=None,
        met=True,
        made_of={"holds per s": rate, "p50 ms": ordered[len(ordered) // 2] * 1000, "holds": float(len(ordered))},
    )
