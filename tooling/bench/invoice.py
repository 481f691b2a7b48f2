"""``invoice``: the draft of a month of ten million records, from the sums by hour. Its lines must equal the sums."""

from __future__ import annotations

import resource
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import perf_counter
from zoneinfo import ZoneInfo

from services.billing.credit import accounts
from services.billing.invoices import closing
from services.billing.plans import plans, subscriptions
from services.billing.plans.calendar import full_period
from services.billing.plans.plans import Plan, PlanCharge
from services.billing.rating.schemes import SchemeTier
from tooling.bench.fixture import Fixture
from tooling.bench.protocol import Units
from tooling.bench.reserve import TENANT, prepare

RECORDS = 10_000_000
AGENTS, MODELS = 10, 5


async def measure(place: Fixture, progress: Callable[[int, int], None]) -> list[Units]:
    """Raises ValueError if the invoice differs from the records."""
    database = await prepare(place)
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    month = full_period(midnight - timedelta(seconds=1), midnight.day, "month", ZoneInfo("UTC"))
    plan = Plan(
        name="bench",
        currency="USD",
        interval="month",
        base_nanos=10**9,
        charges=[PlanCharge("input_tokens", "per_unit", [SchemeTier(None, Decimal("1.5"))], by="agent")],
        usage_markup_percent=Decimal(10),
    )
    async with database.begin(tenant_id=TENANT) as tx:
        await accounts.open_account(tx, TENANT, "USD", None)
        stored = await plans.add(tx, plan, made_by="bench")
        await subscriptions.subscribe(
            tx, TENANT, stored.id, starts_at=month.begins, anchor_day=midnight.day, time_zone="UTC"
        )
        [(period,)] = await tx.sql("SELECT min(period) FROM period WHERE tenant_id = $1", TENANT)
    hours = int((month.ends - month.begins) / timedelta(hours=1))
    each = RECORDS // (hours * AGENTS * MODELS)
    await place.admin.execute("SET search_path = billing")
    buckets = await place.admin.execute(
        """
        INSERT INTO usage_bucket
        SELECT $1, $2, $3::timestamptz + h * interval '1 hour', m.meter, 'acme/model-' || r, 'agent-' || a, '', 'v@1',
               false, $4, $4::bigint * 1000, 1, 1, 0
        FROM generate_series(0, $5 - 1) AS h, generate_series(1, $6) AS a, generate_series(1, $7) AS r,
             (VALUES ('input_tokens'), ('output_tokens'), ('cost_nanos')) AS m(meter)
        """,
        TENANT,
        period,
        month.begins,
        each,
        hours,
        AGENTS,
        MODELS,
    )
    await place.admin.execute("ANALYZE usage_bucket")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = perf_counter()
    async with database.begin(tenant_id=TENANT) as tx:
        [made] = await closing.close(tx, TENANT, midnight, "")
    seconds = perf_counter() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    await database.engine.dispose()
    tokens = each * hours * AGENTS * MODELS * 1000
    due = 10**9 + tokens * 3 // 2 + tokens * 110 // 100
    if made.subtotal_nanos != due:
        raise ValueError(f"invoice: {made.subtotal_nanos} nano-units were invoiced, {due} are due")
    progress(1, 1)
    return [
        Units(
            bench="invoice",
            measure="draft of a month of 10,000,000 records",
            value=seconds,
            unit="s",
            goal=None,
            met=True,
            made_of={"buckets": float(str(buckets).split()[-1]), "memory grown, KiB": float(grown)},
        )
    ]
