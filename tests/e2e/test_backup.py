"""A backup of the running system is restored into an empty state folder, and everything goes on there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_main_job import Company
from tooling.testing.model_server import ModelServer, Says
from tooling.testing.stack import Stack, private_home, run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import WebhookStandIn


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(tmp_path / "backup.key"))
    with private_home() as home:
        yield home


async def sent(system: System, path: str, update: tuple[bytes, dict[str, str]]) -> None:
    async with system.client() as vendor:
        assert (await vendor.post(path, content=update[0], headers=update[1])).status_code == 200


async def settled(company: Company, run_id: str) -> dict[str, Any]:
    """The bill, documents and audit chain, after the run is billed and every usage record has a verdict."""

    async def billed() -> dict[str, Any] | None:
        run = await company.get(f"/api/v1/runs/{run_id}")
        return run if run["cost_nanos"] is not None else None

    async def balanced() -> dict[str, Any] | None:
        sums = await company.get("/api/v1/billing/reconciliation")
        done = sums["counted"] + sums["duplicate"] + sums["rejected"] + sums["held"]
        return sums if sums["produced"] == done else None

    return {
        "run": await until(billed),
        "sums": await until(balanced),
        "ledger": (await company.get("/api/v1/billing/ledger", limit=200))["items"],
        "documents": await company.all("/api/v1/documents"),
    }


async def indexed(company: Company, document: str) -> bool | None:
    return (await company.get(f"/api/v1/documents/{document}"))["status"] == "indexed" or None


@pytest.mark.timeout(600)
async def test_a_restored_system_has_everything_and_sends_what_was_not_sent(
    system: System, models: ModelServer, empty_home: Path, tmp_path: Path
) -> None:
    stack = Stack(system.home)
    async with WebhookStandIn() as vendor, system.client(await system.tenant("Norrland")) as api:
        company = Company(api)
        agent = await company.agent(models)
        path = await company.channel("webhook", agent, vendor)
        text = "# Care\n\nThe boiler is descaled every 77 days.\n"
        answer = await api.post("/api/v1/documents", files={"file": ("care.md", text.encode(), "text/markdown")})
        document = answer.json()["id"]
        await until(lambda: indexed(company, document))
        models.script("gpt-4o-mini", Says("Every 77 days.", usage=(200, 0, 12, 0)))
        await sent(system, path, vendor.message("How often?", conversation="c1"))
        await until(lambda: _replies(vendor, 1))
        [run] = (await company.get("/api/v1/runs", agent_id=agent))["items"]
        before = await settled(company, run["id"])

        # Accepted, and in no broker.
        stack.stop("rabbitmq")
        try:
            await sent(system, path, vendor.message("Are you there?", conversation="c2"))
            taken = json.loads(run_claw(system.home, "backup", "--to", str(tmp_path), "--json"))
        finally:
            stack.start("rabbitmq")
        await until(lambda: _replies(vendor, 2))
        assert taken["manifest"]["engines"]["rabbitmq"] is None
        assert taken["manifest"]["objects"]["openclaw-media"] >= 1

        done = json.loads(run_claw(empty_home, "restore", taken["file"], "--json"))
        assert done["objects"] == taken["manifest"]["objects"]
        assert done["messages"] > 0
        restored = System.at(empty_home)
        # The same credentials; only the ports are others.
        assert restored.admin_token == system.admin_token
        async with restored.client(api.headers["authorization"].removeprefix("Bearer ")) as there:
            copy = Company(there)
            # The message that waited is answered here too, and the one that was answered is not.
            await until(lambda: _replies(vendor, 3))
            assert [message.to for message in vendor.ledger] == ["c1", "c2", "c2"]
            after = await settled(copy, run["id"])
            assert after["run"] == before["run"]
            assert after["documents"] == before["documents"]
            assert {entry["id"]: entry for entry in after["ledger"]}.items() >= {
                entry["id"]: entry for entry in before["ledger"]
            }.items()
            assert after["sums"]["difference"] == 0
            assert (await copy.get("/api/v1/audit/verify"))["ok"]
            found = await until(lambda: _by_meaning(copy))
            assert found["source"]["document_id"] == document
            await sent(restored, path, vendor.message("And now?", conversation="c1"))
            await until(lambda: _replies(vendor, 4))
            assert len((await copy.get("/api/v1/runs", agent_id=agent))["items"]) == 3
        with pytest.raises(RuntimeError, match="this stack has data"):
            run_claw(empty_home, "restore", taken["file"])
        assert vendor.refusals == []


async def _replies(vendor: WebhookStandIn, count: int) -> bool:
    return len(vendor.ledger) >= count


async def _by_meaning(company: Company) -> dict[str, Any] | None:
    """The best passage, if the index of vectors has it again."""
    body = {"query": "how often is the boiler descaled", "mode": "dense", "min_similarity": 0.1}
    answer = await company.api.post("/api/v1/memory/search", json=body)
    items: list[dict[str, Any]] = answer.json().get("items", [])
    return items[0] if items else None
