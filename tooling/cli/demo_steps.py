"""The demo in its order. Every claim is awaited or checked before it is printed; what fails to hold ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from rich.console import Console
from rich.text import Text

import tooling.testing
from tooling.cli.client import Gateway, gateway
from tooling.cli.run import draw, money
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home
from tooling.stack.operator import printable
from tooling.testing.otlp import ReceivedSpan, render_trace
from tooling.testing.vendors import TelegramStandIn

T = TypeVar("T")
Update = tuple[bytes, dict[str, str]]

HANDBOOK = Path(tooling.testing.__file__).parent / "handbook"
QUESTION = "How many months is the warranty for households?"
# Whose spans a complete story has.
SERVICES = {"channel", "agent", "memory", "billing"}
DEADLINE_SECONDS = 60
# How long nothing may follow from the repeated webhook.
WATCH_SECONDS = 3.0


@dataclass(frozen=True)
class Model:
    """`provider`: base_url and api_key; None for the scripted one."""

    name: str
    provider: dict[str, str] | None


@dataclass
class _Setup:
    tenant_id: str
    agent_id: str
    webhook: str


class Story:
    def __init__(self, home: Home, model: Model, console: Console, began: float) -> None:
        access = home.credentials()
        self._home = home
        self._base_url: str = access["base_url"]
        self._admin_token: str = access["admin_token"]
        self._model = model
        self._console = console
        self._began = began
        self._sent_at = 0.0

    async def tell(self) -> dict[str, Any]:
        """What ``--json`` prints. Raises EngineError where a part of the story does not hold."""
        async with gateway(self._base_url, self._admin_token) as operator:
            tenant = await operator.post(
                "/api/v1/tenants", {"name": "Norrland Kaffeteknik (demo)", "credit_nanos": 5_000_000_000}
            )
        async with (
            gateway(self._base_url, tenant["api_key"]) as api,
            TelegramStandIn() as vendor,
        ):
            setup = await self._set_up(api, vendor, tenant)
            seconds = {"setup": round(time.monotonic() - self._began, 1)}
            update = vendor.update(QUESTION)
            run, seconds["answer"] = await self._one_message(api, vendor, setup, update)
            result = await self._look_back(api, run)
            duplicates = await self._again(api, vendor, setup, update)
            audit = await self._audit(api)
        self._what_next()
        return {
            "reply": run["reply"],
            "delivered": True,
            "sources": result["sources"],
            "run_id": run["id"],
            "trace_id": run["trace_id"],
            "trace": result["trace"],
            "usage": result["usage"],
            "audit": audit,
            "duplicates": duplicates,
            "seconds": seconds,
        }

    async def _set_up(self, api: Gateway, vendor: TelegramStandIn, tenant: dict[str, Any]) -> _Setup:
        self._title(1, "Setting up")
        self._line("tenant", f"{tenant['name']}, 5.00 USD of credit")
        provider = {"provider": self._model.provider} if self._model.provider else {}
        agent = await api.post(
            "/api/v1/agents",
            {
                "name": "Handbook helper",
                "model": self._model.name,
                "system_prompt": "You answer customers' questions about the Linnea 2, briefly, from the handbook.",
                "knowledge": True,
                "tools": ["calculator"],
                **provider,
            },
        )
        self._home.write_demo(
            {"tenant_id": tenant["id"], "api_key": tenant["api_key"], "agent_id": agent["id"]},
        )
        self._line("agent", f"{agent['name']}, model {self._model.name}, may use the calculator")
        channel = await api.post(
            "/api/v1/channels",
            {
                "type": "telegram",
                "agent_id": agent["id"],
                "credentials": vendor.credentials,
                "api_base": vendor.url,
            },
        )
        self._line("channel", f"telegram, its vendor the local stand-in at {vendor.url}")
        for path in sorted(HANDBOOK.glob("*.md")):
            await self._upload(api, path)
        return _Setup(tenant["id"], agent["id"], channel["webhook_path"])

    async def _upload(self, api: Gateway, path: Path) -> None:
        began = time.monotonic()
        with path.open("rb") as file:
            document = await api.call("POST", "/api/v1/documents", files={"file": (path.name, file, "text/markdown")})

        async def indexed() -> bool:
            found = await api.get(f"/api/v1/documents/{document['id']}")
            if found["status"] == "failed":
                raise EngineError(f"{path.name} could not be indexed: {found['error']}")
            return bool(found["status"] == "indexed")

        await self._until(f"{path.name} to be indexed", indexed)
        self._line("document", f"{path.name}, indexed in {time.monotonic() - began:.1f} s")

    async def _one_message(
        self, api: Gateway, vendor: TelegramStandIn, setup: _Setup, update: Update
    ) -> tuple[dict[str, Any], float]:
        self._title(2, "One message on its way")
        self._sent_at = time.monotonic()
        await self._webhook(setup, update)
        self._hop("channel", f"has the webhook, verified and stored: “{QUESTION}”")

        async def found() -> list[dict[str, Any]]:
            items: list[dict[str, Any]] = (await api.get("/api/v1/runs", agent_id=setup.agent_id))["items"]
            return items

        [run] = await self._until("the run", found)
        self._hop("agent", f"starts run {run['id']}")
        await self._follow(api, run["id"])

        async def delivered() -> bool:
            return bool(vendor.ledger)

        await self._until("the reply at the vendor", delivered)
        answer = round(time.monotonic() - self._sent_at, 3)
        self._hop("vendor", "has the reply (local stand-in)")

        async def billed() -> dict[str, Any] | None:
            whole: dict[str, Any] = await api.get(f"/api/v1/runs/{run['id']}")
            return whole if whole["status"] == "completed" and whole["cost_nanos"] is not None else None

        run = await self._until("the charge", billed)
        self._hop("billing", f"has charged {money(run['cost_nanos'], run['currency'])}")
        self._must(vendor.texts() == [run["reply"]], f"the vendor was sent {vendor.texts()!r}, not the run's reply")
        self._console.print()
        for line in run["reply"].split("\n"):
            self._console.print(Text(f"   │ {printable(line)}", "green"), soft_wrap=True)
        return run, answer

    async def _follow(self, api: Gateway, run_id: str) -> None:
        """Prints the run's events as they come, to its end."""
        async for event in api.events("GET", f"/api/v1/runs/{run_id}/events"):
            data = event.data
            if event.name == "step.completed":
                name = f" {printable(data['name'])}" if data["name"] else ""
                self._hop("agent", f"step {data['step']}: {data['kind']}{name}, {data['duration_ms']} ms")
            elif event.name in ("run.failed", "run.refused", "run.cancelled"):
                raise EngineError(f"the run ended as {event.name}: {data.get('error')}")

    async def _look_back(self, api: Gateway, run: dict[str, Any]) -> dict[str, Any]:
        self._title(3, "What is on record of it")
        timeline = (await api.get(f"/api/v1/runs/{run['id']}/timeline"))["items"]
        draw(self._console, run, timeline)
        sources = [
            passage["source"] for item in timeline if item["kind"] == "retrieve" for passage in item["data"]["passages"]
        ]
        self._must(bool(sources), "the answer has no source")
        charges = [item for item in timeline if item["kind"] == "charge"]
        self._must(bool(charges), "nothing was charged")

        async def complete() -> list[ReceivedSpan] | None:
            spans = [_span(span) for span in (await api.get(f"/api/v1/traces/{run['trace_id']}"))["items"]]
            return spans if {span.service for span in spans} >= SERVICES else None

        spans = await self._until(f"the trace of {', '.join(sorted(SERVICES))}", complete)
        self._console.print(f"\n   One trace, {run['trace_id']}:")
        self._console.print(render_trace(spans, run["trace_id"]))
        reconciliation = await self._until("the books to balance", lambda: self._balanced(api))
        return {
            "sources": sources,
            "trace": {"services": sorted({span.service for span in spans}), "spans": len(spans)},
            "usage": {
                "records": reconciliation["counted"],
                "tokens": sum(count or 0 for name, count in run["usage"].items() if name != "cached_tokens"),
                "billed_nanos": run["cost_nanos"],
                "currency": run["currency"],
            },
        }

    async def _balanced(self, api: Gateway) -> dict[str, Any] | None:
        found: dict[str, Any] = await api.get("/api/v1/billing/reconciliation")
        return found if found["difference"] == 0 and found["counted"] == found["produced"] else None

    async def _again(self, api: Gateway, vendor: TelegramStandIn, setup: _Setup, update: Update) -> dict[str, int]:
        self._title(4, "The same webhook once more")
        await self._webhook(setup, update)
        self._line("channel", "answers 200: it has that update already")
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            runs = (await api.get("/api/v1/runs", agent_id=setup.agent_id))["items"]
            self._must(
                len(runs) == 1 and len(vendor.ledger) == 1,
                f"{len(runs)} runs and {len(vendor.ledger)} replies after it",
            )
            await asyncio.sleep(0.2)
        self._line("", f"watched for {WATCH_SECONDS:.0f} s: 1 run, 1 reply, as before")
        return {"sent": 1, "runs": len(runs), "replies": len(vendor.ledger)}

    async def _audit(self, api: Gateway) -> dict[str, Any]:
        async def chained() -> dict[str, Any] | None:
            found: dict[str, Any] = await api.get("/api/v1/audit/verify")
            return found if found["records"] else None

        audit = await self._until("the audit chain", chained)
        self._must(audit["ok"], f"the audit chain is broken: {audit}")
        self._line("audit", f"{audit['records']} acts in an unbroken chain of hashes")
        return {"records": audit["records"], "chain_ok": audit["ok"]}

    def _what_next(self) -> None:
        key = (
            ""
            if self._model.provider
            else "\n  OPENAI_API_KEY=… ./claw demo   with a real model (or ANTHROPIC_API_KEY)"
        )
        self._console.print(
            f"\nThe stack still runs. Next:\n"
            f"  ./claw chat                    talk to this agent in the terminal{key}\n"
            f"  ./claw run show ID             any run's timeline\n"
            f"  {self._base_url}/docs/    every call, to try\n"
            "  a real bot: POST /api/v1/channels with its bot_token and a secret_token of\n"
            "  yours, without api_base; then Telegram's setWebhook to your public URL and\n"
            "  the webhook_path of the answer, with the same secret_token\n"
            "  ./claw status, ./claw logs, ./claw dlq list, ./claw down",
            soft_wrap=True,
        )

    async def _webhook(self, setup: _Setup, update: Update) -> None:
        """As the vendor sends it: these bytes, with the secret that was agreed in a header."""
        body, headers = update
        async with httpx.AsyncClient(base_url=self._base_url, trust_env=False, timeout=30) as client:
            answer = await client.post(setup.webhook, content=body, headers=headers)
        self._must(answer.status_code == 200, f"the webhook was answered {answer.status_code}: {answer.text}")

    async def _until(self, what: str, ask: Callable[[], Awaitable[T | None]]) -> T:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not (answer := await ask()):
            if time.monotonic() > deadline:
                raise EngineError(f"the demo waited {DEADLINE_SECONDS} s in vain for {what}")
            await asyncio.sleep(0.05)
        return answer

    def _must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise EngineError(f"the demo failed: {otherwise}")

    def _title(self, number: int, text: str) -> None:
        self._console.print(f"\n[bold]{number}  {text}[/]")

    def _line(self, who: str, what: str) -> None:
        self._console.print(f"   {who:<9} {what}", soft_wrap=True)

    def _hop(self, who: str, what: str) -> None:
        self._line(f"+{(time.monotonic() - self._sent_at) * 1000:5.0f} ms", f"{who:<8} {printable(what)}")


def _span(document: dict[str, Any]) -> ReceivedSpan:
    fields = {name: document[name] for name in ReceivedSpan.__dataclass_fields__}
    return ReceivedSpan(**fields | {"links": tuple((trace, span) for trace, span in document["links"])})
