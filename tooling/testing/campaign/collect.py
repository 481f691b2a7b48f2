"""Reads the answers of the system after a campaign: by its API, its buses, its logs and its commands."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.bus.kafka import printable_headers
from protos.catalog import CATALOG, USAGE_RECORDS
from tooling.testing.campaign.evidence import (
    Account,
    Chain,
    Charge,
    DeadLetter,
    Evidence,
    Leak,
    Poison,
    Rebuilt,
    Run,
    Step,
)
from tooling.testing.campaign.load import Load, Tenant
from tooling.testing.stack import Stack, run_claw
from tooling.testing.system import Company, System
from tooling.testing.until import until

T = TypeVar("T")
# The state must settle within this time after the last reply.
SETTLE_SECONDS = 120.0
# So many runs are read at the same time.
READERS = 4
# So many of a tenant's runs are asked for by another tenant.
FOREIGN_RUNS = 5
# The events of so many of a tenant's own runs are searched.
OWN_RUNS = 20


class Collector:
    """`since`: Unix seconds of the campaign's begin, before it made its tenants. `problems`: those that it had."""

    def __init__(
        self,
        system: System,
        stack: Stack,
        load: Load,
        poison: Sequence[Poison],
        since: float,
        problems: Sequence[str] = (),
    ) -> None:
        self._system = system
        self._stack = stack
        self._load = load
        self._poison = poison
        self._since = since
        self._problems = list(problems)
        self._records: dict[str, list[str]] = defaultdict(list)

    async def evidence(self) -> Evidence:
        load = self._load
        await self._try("the bills are not settled", self._settled())
        topics = await self._topics()
        runs = [run for tenant in load.tenants.values() for run in await self._runs(tenant)]
        return Evidence(
            canaries={tenant.name: tenant.canary for tenant in load.tenants.values()},
            sent=load.sent,
            forged=load.forged,
            forged_accepted=load.forged_accepted,
            replies=load.replies(),
            calls=load.calls_of_model,
            runs=runs,
            dead_letters=await self._dead_letters(),
            accounts=[await self._account(tenant) for tenant in load.tenants.values()],
            leaks=[topics, self._logs(), *await self._answers(runs)],
            chains=await self._chains(),
            rebuilt=await self._rebuilt(),
            poison=list(self._poison),
            asked_twice=load.asked_twice,
            problems=self._problems,
        )

    async def _try(self, what: str, work: Any) -> None:
        try:
            await work
        except TimeoutError as error:
            self._problems.append(f"{what}: {error}")

    async def _settled(self) -> None:
        async def settled() -> bool:
            for tenant in self._load.tenants.values():
                found = await tenant.company.get("/api/v1/billing/reconciliation")
                done = found["counted"] + found["duplicate"] + found["rejected"] + found["held"]
                balance = await tenant.company.get("/api/v1/billing/balance")
                if found["produced"] != done or found["pending"] or balance["held_nanos"]:
                    return False
            return True

        await until(settled, seconds=SETTLE_SECONDS)

    async def _runs(self, tenant: Tenant) -> list[Run]:
        found = await tenant.company.all("/api/v1/runs", agent_id=tenant.agent)
        limit = asyncio.Semaphore(READERS)

        async def one(run: dict[str, Any]) -> Run:
            async with limit:
                path = f"/api/v1/runs/{run['id']}"
                timeline = (await tenant.company.get(f"{path}/timeline"))["items"]
                return run_of(tenant.name, run, timeline, await tenant.company.get(f"{path}/state"))

        return await asyncio.gather(*(one(run) for run in found))

    async def _dead_letters(self) -> list[DeadLetter]:
        """Those of this campaign, with their payloads. Poison is discarded after it was seen."""
        poison = {one.message_id for one in self._poison}
        async with self._system.operator() as operator:

            async def all_there() -> bool:
                return poison <= {letter["message_id"] for letter in await operator.all("/api/v1/deadletters")}

            # Those that are missing now are found by the judge.
            await self._try("poison is not parked", until(all_there, seconds=30))
            found = []
            for letter in await operator.all("/api/v1/deadletters"):
                if _unix(letter["first_failed_at"]) < self._since:
                    continue
                whole = await operator.get(f"/api/v1/deadletters/{letter['id']}")
                found.append(msgspec.convert({**whole, "payload": whole["payload"] or ""}, DeadLetter))
                if letter["message_id"] in poison:
                    await operator.api.delete(f"/api/v1/deadletters/{letter['id']}")
        return found

    async def _account(self, tenant: Tenant) -> Account:
        company = tenant.company
        balance = await company.get("/api/v1/billing/balance")
        found = await company.get("/api/v1/billing/reconciliation")
        usage = await company.all("/api/v1/billing/usage")
        ledger = await company.all("/api/v1/billing/ledger")
        return Account(
            tenant=tenant.name,
            credit_nanos=balance["credit_nanos"],
            debited_nanos=balance["debited_nanos"],
            held_nanos=balance["held_nanos"],
            difference=found["difference"],
            unsettled=found["pending"] + found["held"] + found["rejected"],
            usage=[
                Charge(row["usage_id"], row["resource"], row["verdict"], row["amount_nanos"] or 0, row["estimated"])
                for row in usage
            ],
            debits=[(row["usage_id"], -row["amount_nanos"]) for row in ledger if row["usage_id"]],
            records=self._records[tenant.name],
        )

    async def _topics(self) -> Leak:
        """Searches all records of all topics for canaries, and takes the usage records out."""
        names = {tenant.company.id: tenant.name for tenant in self._load.tenants.values()}
        leak = Leak("topics", 0, [])
        consumer = AIOKafkaConsumer(bootstrap_servers=self._stack.kafka_bootstrap_servers, enable_auto_commit=False)
        await consumer.start()
        try:
            for topic in CATALOG.topics:
                partitions = [TopicPartition(topic.name, n) for n in range(topic.partitions)]
                consumer.assign(partitions)
                offsets = await consumer.offsets_for_times(dict.fromkeys(partitions, int(self._since * 1000)))
                ends = await consumer.end_offsets(partitions)
                left = {tp: ends[tp] for tp in partitions if offsets[tp] and offsets[tp].offset < ends[tp]}
                for tp in partitions:
                    consumer.seek(tp, offsets[tp].offset if tp in left else ends[tp])
                for tp, end in left.items():
                    while await consumer.position(tp) < end:
                        for record in (await consumer.getmany(tp, timeout_ms=500)).get(tp, []):
                            leak.searched += 1
                            headers, _ = printable_headers(record.headers)
                            owner = names.get(headers.get("tenant_id", ""), "")
                            if topic is USAGE_RECORDS and owner:
                                self._records[owner].append(json.loads(record.value)["usage_id"])
                            where = f"{topic.name} {record.partition}/{record.offset}"
                            text = (record.value or b"").decode(errors="replace")
                            leak.found += self._foreign(owner, text, where)
        finally:
            await consumer.stop()
        return leak

    def _logs(self) -> Leak:
        """Log lines hold no texts of people, so no canary at all."""
        leak = Leak("logs", 0, [])
        # Of the engines too, and with the parts that were rotated: channel.log.1.
        for path in sorted((self._system.home / "log").glob("*.log*")):
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
                leak.searched += 1
                leak.found += self._foreign("", line, f"{path.name}, line {number}")
        return leak

    async def _answers(self, runs: Sequence[Run]) -> list[Leak]:
        """Asks as each tenant for everything that its key shows, and for the other tenants' runs and vectors."""
        lists, searches, streams = Leak("lists", 0, []), Leak("searches", 0, []), Leak("streams", 0, [])
        for tenant in self._load.tenants.values():
            for path in ("runs", "messages", "documents", "audit", "deadletters", "logs"):
                for item in await tenant.company.all(f"/api/v1/{path}"):
                    lists.searched += 1
                    lists.found += self._foreign(tenant.name, json.dumps(item), f"/api/v1/{path} of {tenant.name}")
            for other in self._load.tenants.values():
                query = {"query": f"The bird called {other.canary}", "min_similarity": -1, "limit": 50}
                answer = (await tenant.company.api.post("/api/v1/memory/search", json=query)).json()
                for item in answer["items"]:
                    searches.searched += 1
                    searches.found += self._foreign(tenant.name, json.dumps(item), f"a search of {tenant.name}")
            for run in [run for run in runs if run.tenant == tenant.name and run.finished][:OWN_RUNS]:
                # It ends with the run's last event.
                events = await tenant.company.api.get(f"/api/v1/runs/{run.id}/events")
                streams.searched += 1
                streams.found += self._foreign(tenant.name, events.text, f"the events of a run of {tenant.name}")
            for run in [run for run in runs if run.tenant != tenant.name][:FOREIGN_RUNS]:
                for part in ("", "/timeline", "/state", "/events"):
                    streams.searched += 1
                    path = f"/api/v1/runs/{run.id}{part}"
                    async with tenant.company.api.stream("GET", path) as answer:
                        if answer.status_code != 404:
                            status = f"{tenant.name} is answered {answer.status_code}, not 404"
                            streams.found.append(f"run{part} of {run.tenant}: {status}")
        return [lists, searches, streams]

    def _foreign(self, owner: str, text: str, where: str) -> Iterator[str]:
        for tenant in self._load.tenants.values():
            if tenant.name != owner and tenant.canary in text:
                yield f"the canary of {tenant.name} is in {where}"

    async def _chains(self) -> list[Chain]:
        # It stores the heads of all chains when it starts, and then each hour.
        await asyncio.to_thread(self._stack.kill, "log_aggregator")
        chains = []
        async with self._system.operator() as operator:
            owners = [(tenant.name, tenant.company) for tenant in self._load.tenants.values()]
            if self._poison:
                # The chain of the system has the operator's reads of dead letters. Without any, it is empty.
                owners.append(("", operator))
            for owner, company in owners:
                try:
                    found = await until(_verified(company), seconds=SETTLE_SECONDS)
                except TimeoutError:
                    chains.append(Chain(owner, ok=False, records=0, stored_heads=0))
                    continue
                stored = found["stored"]["heads"] if found["stored"] else 0
                chains.append(Chain(owner, found["ok"], found["records"], stored))
        return chains

    async def _rebuilt(self) -> list[Rebuilt]:
        rebuilt = []
        async with self._system.operator() as operator:
            for tenant in self._load.tenants.values():
                path = "/api/v1/billing/usage/rebuild"
                answer = await operator.api.post(path, params={"tenant_id": tenant.company.id})
                found = answer.raise_for_status().json()
                rebuilt.append(Rebuilt(f"the sums of usage of {tenant.name}", found["equal"], found["hash_after"]))
        listed = json.loads(await asyncio.to_thread(run_claw, self._system.home, "replay", "--list", "--json"))
        for name in sorted(one["name"] for one in listed):
            note = ""
            try:
                await asyncio.to_thread(run_claw, self._system.home, "replay", name, "--json")
            except RuntimeError as error:
                note = str(error)[-300:]
            rebuilt.append(Rebuilt(f"read model {name}", equal=not note, note=note))
        return rebuilt


def _verified(company: Company) -> Callable[[], Any]:
    async def verified() -> dict[str, Any] | None:
        answer = await company.api.get("/api/v1/audit/verify")
        found: dict[str, Any] | None = answer.json() if answer.status_code == 200 else None
        return found if found and found["records"] and (found["stored"] or {}).get("heads") else None

    return verified


def run_of(tenant: str, run: dict[str, Any], timeline: list[dict[str, Any]], state: dict[str, Any]) -> Run:
    """A run from the API's answers."""
    over = run["status"] in ("completed", "failed", "cancelled", "refused")
    live = [over, [[s["n"], s["kind"], s["name"], s["status"], s["attempts"]] for s in run["steps"]]]
    folded = [
        state["status"] == "over",
        [
            [s["n"], s["kind"], s["name"], s["status"].replace("started", "running"), s["attempt"]]
            for s in state["steps"]
        ],
    ]
    return Run(
        tenant=tenant,
        id=run["id"],
        session=run["session_key"],
        status=run["status"],
        error=run["error"],
        texts=[item["data"]["text"] for item in timeline if item["kind"] == "inbound"],
        started=run["started_at"] and _unix(run["started_at"]),
        finished=run["finished_at"] and _unix(run["finished_at"]),
        steps=[Step(s["n"], s["kind"], s["status"], s["attempts"]) for s in run["steps"]],
        deliveries=[item["data"]["state"] for item in timeline if item["kind"] == "delivery"],
        live=_hash(live),
        folded=_hash(folded),
        timeline=[f"{item['at']} {item['service']}: {_brief(item)}" for item in timeline],
    )


def _brief(item: dict[str, Any]) -> str:
    return re.sub(r"\s+", " ", f"{item['kind']}, {item['summary']}")


def _hash(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()


def _unix(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()
