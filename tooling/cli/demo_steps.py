"""The steps of the demo. Each printed line was checked before; the first check that fails ends the demo."""

from __future__ import annotations

import asyncio
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

import tooling.testing
from tooling.cli.client import Gateway, gateway
from tooling.cli.demo_base import DemoBase
from tooling.cli.output import printable
from tooling.cli.run import draw, money
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home
from tooling.testing.otlp import ReceivedSpan, render_trace
from tooling.testing.vendors import TelegramStandIn

# The body and headers of a webhook.
Webhook = tuple[bytes, dict[str, str]]

HANDBOOK = Path(tooling.testing.__file__).parent / "handbook"
QUESTION = "How many months is the warranty for households?"
# The services that must have spans in the trace of the message.
SERVICES = {"channel", "agent", "memory", "billing"}
# The time in which the repeated webhook must not cause a run or a reply.
WATCH_SECONDS = 3.0


@dataclass(frozen=True)
class Model:
    """The model of the demo's agent."""

    name: str
    provider: dict[str, str] | None
    """base_url and api_key; None for the scripted model."""


class Demo(DemoBase):
    """One demo, from a new tenant to an audit record."""

    LABEL_WIDTH = 9

    def __init__(self, home: Home, model: Model, console: Console, began: float) -> None:
        super().__init__(home, console)
        self._home = home
        self._model = model
        self._began = began
        self._sent_at = 0.0

    async def run(self) -> dict[str, Any]:
        """Runs all steps. Returns the document that ``--json`` prints. Raises EngineError if a check fails."""
        async with gateway(self._base_url, self._admin_token) as operator:
            tenant = await operator.post(
                "/api/v1/tenants", {"name": "Norrland Kaffeteknik (demo)", "credit_nanos": 5_000_000_000}
            )
        async with (
            gateway(self._base_url, tenant["api_key"]) as api,
            TelegramStandIn() as vendor,
        ):
            agent_id, path = await self._set_up(api, vendor, tenant)
            seconds = {"setup": round(time.monotonic() - self._began, 1)}
            webhook = vendor.update(QUESTION)
            run, seconds["answer"] = await self._send_message(api, vendor, agent_id, path, webhook)
            result = await self._show_records(api, run)
            duplicates = await self._repeat_webhook(api, vendor, agent_id, path, webhook)
            audit = await self._verify_audit(api)
        self._print_next_commands()
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

    async def _set_up(self, api: Gateway, vendor: TelegramStandIn, tenant: dict[str, Any]) -> tuple[str, str]:
        """Makes agent, channel and documents. Returns the agent's id and the path of the channel's webhook."""
        self._title(1, "Set up a tenant")
        self._line("tenant", f"{tenant['name']}, with 5.00 USD of credit")
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
        self._line("agent", f"{agent['name']}, with model {self._model.name} and tool calculator")
        channel = await api.post(
            "/api/v1/channels",
            {
                "type": "telegram",
                "agent_id": agent["id"],
                "credentials": vendor.credentials,
                "api_base": vendor.url,
            },
        )
        self._line("channel", f"telegram, with the stand-in at {vendor.url} as its vendor")
        for path in sorted(HANDBOOK.glob("*.md")):
            await self._upload(api, path)
        return agent["id"], channel["webhook_path"]

    async def _upload(self, api: Gateway, path: Path) -> None:
        began = time.monotonic()
        with path.open("rb") as file:
            document = await api.call("POST", "/api/v1/documents", files={"file": (path.name, file, "text/markdown")})

        async def indexed() -> bool:
            found = await api.get(f"/api/v1/documents/{document['id']}")
            if found["status"] == "failed":
                raise EngineError(f"the demo failed: could not index {path.name}: {found['error']}")
            return bool(found["status"] == "indexed")

        await self._wait_for(f"the index of {path.name}", indexed)
        self._line("document", f"{path.name}, indexed in {time.monotonic() - began:.1f} s")

    async def _send_message(
        self, api: Gateway, vendor: TelegramStandIn, agent_id: str, path: str, webhook: Webhook
    ) -> tuple[dict[str, Any], float]:
        """Sends the webhook. Returns the finished run, and the seconds until the vendor had the reply."""
        self._title(2, "Send one message")
        self._console.print(f"   The customer asks: {QUESTION}")
        self._sent_at = time.monotonic()
        await self._post_webhook(path, webhook)
        self._event("channel", "has verified and stored the webhook")

        async def found() -> list[dict[str, Any]]:
            items: list[dict[str, Any]] = (await api.get("/api/v1/runs", agent_id=agent_id))["items"]
            return items

        [run] = await self._wait_for("the run", found)
        self._event("agent", f"has started run {run['id']}")
        await self._follow(api, run["id"])

        async def delivered() -> bool:
            return bool(vendor.ledger)

        await self._wait_for("the reply at the vendor", delivered)
        answer = round(time.monotonic() - self._sent_at, 3)
        self._event("vendor", "has received the reply (the local stand-in)")

        async def billed() -> dict[str, Any] | None:
            whole: dict[str, Any] = await api.get(f"/api/v1/runs/{run['id']}")
            return whole if whole["status"] == "completed" and whole["cost_nanos"] is not None else None

        run = await self._wait_for("the charge", billed)
        self._event("billing", f"has charged {money(run['cost_nanos'], run['currency'])}")
        self._require(
            vendor.texts() == [run["reply"]], f"the vendor received {vendor.texts()!r} instead of the run's reply"
        )
        self._console.print("\n   The reply:")
        for paragraph in run["reply"].split("\n"):
            for line in textwrap.wrap(printable(paragraph), min(80, self._console.width) - 5) or [""]:
                self._console.print(Text(f"   │ {line}", "green"))
        return run, answer

    async def _follow(self, api: Gateway, run_id: str) -> None:
        """Prints the steps of the run until its end."""
        async for event in api.events("GET", f"/api/v1/runs/{run_id}/events"):
            data = event.data
            if event.name == "step.completed":
                name = f" {printable(data['name'])}" if data["name"] else ""
                self._event(
                    "agent", f"has completed step {data['step']}: {data['kind']}{name}, in {data['duration_ms']} ms"
                )
            elif event.name in ("run.failed", "run.refused", "run.cancelled"):
                raise EngineError(f"the demo failed: the run ended with {event.name}: {data.get('error')}")

    async def _show_records(self, api: Gateway, run: dict[str, Any]) -> dict[str, Any]:
        """Prints the timeline and the trace of the run. Returns sources, trace and usage."""
        self._title(3, "Read the records of the run")
        timeline = (await api.get(f"/api/v1/runs/{run['id']}/timeline"))["items"]
        draw(self._console, run, timeline)
        sources = [
            passage["source"] for item in timeline if item["kind"] == "retrieve" for passage in item["data"]["passages"]
        ]
        self._require(bool(sources), "the answer has no source")
        charges = [item for item in timeline if item["kind"] == "charge"]
        self._require(bool(charges), "the run was not charged")

        known: list[ReceivedSpan] = []

        async def complete() -> list[ReceivedSpan] | None:
            """The spans, if all services have sent theirs and no span arrived in the last second."""
            before = len(known)
            known[:] = [_span(span) for span in (await api.get(f"/api/v1/traces/{run['trace_id']}"))["items"]]
            if {span.service for span in known} >= SERVICES and len(known) == before:
                return known
            await asyncio.sleep(1)
            return None

        spans = await self._wait_for(f"spans of {', '.join(sorted(SERVICES))} in the trace", complete)
        self._console.print(f"\n   trace {run['trace_id']}, in all services:")
        self._console.print(render_trace(spans, run["trace_id"]))
        reconciliation = await self._wait_for("equal amounts in usage and charges", lambda: self._balanced(api))
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

    async def _repeat_webhook(
        self, api: Gateway, vendor: TelegramStandIn, agent_id: str, path: str, webhook: Webhook
    ) -> dict[str, int]:
        """Sends the same webhook again, and checks for a while that no second run or reply follows."""
        self._title(4, "Send the same webhook again")
        await self._post_webhook(path, webhook)
        self._line("channel", "has answered 200 and ignored the webhook, which it had stored before")
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            runs = (await api.get("/api/v1/runs", agent_id=agent_id))["items"]
            self._require(
                len(runs) == 1 and len(vendor.ledger) == 1,
                f"the repeated webhook led to {len(runs)} runs and {len(vendor.ledger)} replies",
            )
            await asyncio.sleep(0.2)
        self._line("", f"after {WATCH_SECONDS:.0f} s there is still 1 run and 1 reply")
        return {"sent": 1, "runs": len(runs), "replies": len(vendor.ledger)}

    async def _verify_audit(self, api: Gateway) -> dict[str, Any]:
        async def chained() -> dict[str, Any] | None:
            found: dict[str, Any] = await api.get("/api/v1/audit/verify")
            return found if found["records"] else None

        audit = await self._wait_for("the audit records", chained)
        self._require(audit["ok"], f"the chain of audit records is broken: {audit}")
        self._line("audit", f"{audit['records']} records of administrative acts, in an unbroken chain of hashes")
        return {"records": audit["records"], "chain_ok": audit["ok"]}

    def _print_next_commands(self) -> None:
        key = (
            ""
            if self._model.provider
            else "  OPENAI_API_KEY=… ./claw demo   use a real model (or ANTHROPIC_API_KEY=…)\n"
        )
        self._console.print(
            "\nThe stack still runs. You can now:\n"
            "  ./claw chat                    talk to this agent in the terminal\n"
            f"{key}"
            "  ./claw run show ID             show the timeline of a run\n"
            "  ./claw status                  show the state of all engines and services\n"
            "  ./claw down                    stop the stack\n"
            f"  {self._base_url}/docs/    read and try the HTTP API\n"
            "\nTo connect a real Telegram bot:\n"
            "  1. POST /api/v1/channels without api_base, with the bot's bot_token and a\n"
            "     secret_token of your choice.\n"
            "  2. Call Telegram's setWebhook with the same secret_token. The URL is your\n"
            "     public address, followed by the webhook_path from the answer.",
            soft_wrap=True,
        )

    async def _post_webhook(self, path: str, webhook: Webhook) -> None:
        """Sends the webhook as the vendor does: exactly these bytes, with the secret in a header."""
        body, headers = webhook
        async with httpx.AsyncClient(base_url=self._base_url, trust_env=False, timeout=30) as client:
            answer = await client.post(path, content=body, headers=headers)
        self._require(answer.status_code == 200, f"the webhook was answered {answer.status_code}: {answer.text}")

    def _event(self, service: str, text: str) -> None:
        """Prints a line with the time since the webhook was sent."""
        self._line(f"+{(time.monotonic() - self._sent_at) * 1000:5.0f} ms", f"{service:<8} {printable(text)}")


def _span(document: dict[str, Any]) -> ReceivedSpan:
    fields = {name: document[name] for name in ReceivedSpan.__dataclass_fields__}
    return ReceivedSpan(**fields | {"links": tuple((trace, span) for trace, span in document["links"])})
