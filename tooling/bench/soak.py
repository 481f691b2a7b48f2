"""``soak``: an hour of steady load on all services; does memory grow, and which tables do?

The system is that of ``message`` with all services and engines. Every fourth message needs a tool. A window is a minute
of load, after which every message has its reply. Memory (USS) is read after each window, while the system is at rest;
the figure is the growth from the second quarter of the hour to the last one. The first quarter is left out: caches and
connections are filled in it.

A table may grow with the messages if its rows are a history. All other tables, such as those of waiting work, of
conversations and of people, must not have more rows after the hour than after half of it: the people are the same.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from statistics import median

from protos.catalog import SERVICES
from tooling.bench import memory
from tooling.bench.fixture import Fixture, running_platform_on
from tooling.bench.overhead import WARM, WARM_RATE, Overhead
from tooling.bench.protocol import Units, units
from tooling.testing.model_server import Asked, Says, model_server
from tooling.testing.vendors import WebhookStandIn

WINDOWS = 60
WINDOW_SECONDS = 55.0
RATE = 3.0
TOOL_EVERY = 4
# Of an hour; another program on the machine must not end it.
PATIENCE = 600.0
# Percent from the second quarter to the last one.
GOAL_SERVICES, GOAL_ENGINES = 10.0, 25.0
# Tables whose rows a message may leave behind. Conversations and money are kept until they are erased.
_KEPT = {
    "agent": ("event", "message", "run", "run_step", "run_usage", "delivery", "stream"),
    "channel": ("event", "stream", "delivery"),
    "billing": ("ledger_entry",),
}
# Retention deletes these rows after hours to weeks.
_FOR_A_TIME = {
    "billing": ("hold", "usage"),
    "channel": ("lane_effect", "inbound_seen"),
    "memory": ("lane", "lane_effect", "utterance"),
    "plugin": ("tool_call",),
}
HISTORIES = frozenset(
    [f"{service}.{table}" for group in (_KEPT, _FOR_A_TIME) for service, tables in group.items() for table in tables]
    + [f"{service}.{table}" for service in SERVICES for table in ("inbox", "outbox", "lane_item")]
)


class Soak(Overhead):
    """The counts of `Overhead` are those of plain answers. Here only webhooks and replies are compared."""

    async def counts(self) -> dict[str, int]:
        return {
            "webhooks": self.sent,
            "replies": len(self.vendor.ledger),
            "different replies": len(set(self.vendor.texts())),
        }


async def measure(
    bench: Overhead, progress: Callable[[int, int], None], windows: int = WINDOWS, seconds: float = WINDOW_SECONDS
) -> list[Units]:
    """Raises ValueError unless each webhook had exactly one reply and nothing is a dead letter."""
    await bench.answer(WARM, WARM_RATE)
    services: list[dict[str, float]] = []
    engines: list[dict[str, float]] = []
    rows, sizes, sent = await _rows(bench), await _sizes(bench), bench.sent
    for number in range(windows):
        await bench.answer(round(RATE * seconds), RATE)
        services.append(memory.of_services(bench.platform))
        engines.append(memory.of_engines(bench.fixture.stack))
        if number + 1 == windows // 2:
            rows, sizes, sent = await _rows(bench), await _sizes(bench), bench.sent
        progress(number + 1, windows)
    messages = bench.sent - sent
    grown = {
        name: (count - rows.get(name, 0)) / messages
        for name, count in (await _rows(bench)).items()
        if count > rows.get(name, 0)
    }
    other = {name: rate for name, rate in sorted(grown.items()) if name not in HISTORIES}
    return [
        _growth("memory of the services", GOAL_SERVICES, services),
        _growth("memory of the engines", GOAL_ENGINES, engines),
        units(
            "soak", "other tables that grow", 0.0, len(other), "tables", windows=windows, messages=bench.sent, **other
        ),
        units("soak", "rows that a message leaves", None, sum(grown.values()), "rows", **grown),
        *(
            units("soak", f"{what} of a message", None, (size - sizes[what]) / messages / 1024, "KiB")
            for what, size in (await _sizes(bench)).items()
        ),
    ]


def _growth(what: str, goal: float, seen: Sequence[dict[str, float]]) -> Units:
    """Percent from the median of the second quarter to that of the last one, with the MiB of each process."""
    quarter = max(1, len(seen) // 4)
    early, late = seen[quarter : 2 * quarter] or seen[:1], seen[-quarter:]
    parts: dict[str, float] = {}
    for name in seen[-1]:
        first, last = (median(one.get(name, 0.0) for one in part) for part in (early, late))
        parts |= {f"{name} MiB": last, f"{name} grown": last - first}
    before, after = (median(sum(one.values()) for one in part) for part in (early, late))
    return units("soak", f"growth of the {what}", goal, max(0.0, (after - before) / before * 100), "%", **parts)


async def _rows(bench: Overhead) -> dict[str, int]:
    """Number of rows of each table, by ``service.table``."""
    tables = await bench.fixture.admin.fetch(
        """
        SELECT nspname AS service, relname AS name FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE relkind IN ('r', 'p') AND NOT relispartition AND nspname = ANY($1::text[]) ORDER BY 1, 2
        """,
        list(bench.services),
    )
    return {
        f"{table['service']}.{table['name']}": await bench.fixture.admin.fetchval(
            f'SELECT count(*) FROM "{table["service"]}"."{table["name"]}"'
        )
        for table in tables
    }


async def _sizes(bench: Overhead) -> dict[str, int]:
    """Bytes of the database, and of all WAL so far."""
    row = await bench.fixture.admin.fetchrow(
        """
        SELECT pg_database_size(current_database()) AS database, (pg_current_wal_lsn() - '0/0')::bigint AS "WAL"
        """
    )
    return dict(row)


def _answer(asked: Asked) -> Says:
    text = asked.last_user_text
    number = text.rpartition(" ")[2]
    asks_tool = number.isdigit() and int(number) % TOOL_EVERY == 0 and "tools" in asked.body
    if asks_tool and asked.body["messages"][-1]["role"] != "tool":
        return Says(calls=(("calculator", '{"expression": "6*7"}'),))
    return Says(f"You said: {text}")


@asynccontextmanager
async def running(place: Fixture) -> AsyncIterator[Soak]:
    async with model_server() as models, WebhookStandIn() as vendor, running_platform_on(place) as platform:
        models.rules["gpt-4o-mini"] = _answer
        bench = Soak(place, platform, models, vendor, services=SERVICES, tools=("calculator",), patience=PATIENCE)
        await bench.prepare()
        yield bench
