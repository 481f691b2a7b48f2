"""The places in which a campaign searches for canaries."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from msgspec.structs import replace

from tests.tooling.testing.campaign.made_up import ONE, run
from tooling.testing.campaign.collect import Collector
from tooling.testing.system import Company


def collector(home: Path, *tenants: Any) -> Collector:
    system: Any = SimpleNamespace(home=home)
    load: Any = SimpleNamespace(tenants={tenant.name: tenant for tenant in tenants})
    return Collector(system, None, load, [], 0.0)  # type: ignore[arg-type]


def test_all_logs_are_searched_with_their_rotated_parts(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    for name in ("channel.log", "channel.log.1", "postgres.log"):
        (tmp_path / "log" / name).write_text("a line\n" if name == "channel.log" else "a line\nx canaryred y\n")
    leak = collector(tmp_path, SimpleNamespace(name="red", canary="canaryred"))._logs()
    assert leak.searched == 5
    assert leak.found == [f"the canary of red is in {name}, line 2" for name in ("channel.log.1", "postgres.log")]


async def test_the_events_of_a_tenants_own_runs_are_searched(tmp_path: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("r1/events"):
            return httpx.Response(200, text="event: delta\ndata: canaryblue\n\n")
        return httpx.Response(404 if "/runs/" in request.url.path else 200, json={"items": [], "next": None})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
        company = Company(client)
        tenants = [SimpleNamespace(name=name, canary=f"canary{name}", company=company) for name in ("red", "blue")]
        runs = [run("r1", ONE, 1.0), replace(run("r2", ONE, 1.0), tenant="blue", finished=None)]
        *_, streams = await collector(tmp_path, *tenants)._answers(runs)
    assert streams.found[0] == "the canary of blue is in the events of a run of red"
