"""``./claw demo --billing``: a synthetic month of three tenants, from usage to paid invoices and back to one record.

The usage is made up and says so. All the rest is real: the records go through the outbox, Kafka and the billing
service; the payment provider is a local stand-in for Stripe that checks each call. The first check that fails ends it.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import httpx
from rich.console import Console

from infra.clock import uuid7
from protos.catalog import USAGE_RECORDS
from protos.messages.billing import UsageRecorded
from services.billing.plans.calendar import full_period
from tooling.cli.client import Gateway, gateway
from tooling.cli.demo_base import DemoBase
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home
from tooling.stack.operator import database, engines_access
from tooling.testing.stripe import StripeStandIn

UNIT = 10**9
RECORDS = 200
"""Of each tenant."""


class BillingDemo(DemoBase):
    """One demo, from three plans to books that reconcile to zero."""

    LABEL_WIDTH = 12

    def __init__(self, home: Home, console: Console) -> None:
        super().__init__(home, console)
        self._place = home.place()
        self._model = f"synthetic/{uuid7()}"
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        self._anchor = midnight.day
        self._month = full_period(midnight - timedelta(seconds=1), midnight.day, "month", ZoneInfo("UTC"))
        self._random = random.Random(14)

    async def run(self) -> dict[str, Any]:
        """Returns the document that ``--json`` prints. Raises EngineError if a check fails."""
        stripe = StripeStandIn()
        stripe.key, stripe.webhook_secret = self._place.secret("stripe_key"), self._place.secret("stripe_webhook")
        await stripe.start(self._place.ports["payments"])
        try:
            async with gateway(self._base_url, self._admin_token) as operator:
                return await self._steps(operator, stripe)
        finally:
            await stripe.stop()

    async def _steps(self, operator: Gateway, stripe: StripeStandIn) -> dict[str, Any]:
        self._title(1, f"Three tenants on three plans, {self._month.begins:%d %B} to {self._month.ends:%d %B %Y}")
        await self._price(operator, input_tokens="200", output_tokens="800")
        tenants = [await self._tenant(operator, plan) for plan in _plans(self._random.randrange(10**9))]
        self._title(2, "A month of synthetic usage")
        await self._use(tenants)
        self._title(3, "Invoices")
        for tenant in tenants:
            await self._invoice(operator, tenant)
        self._title(4, "The price was wrong: rate the month again")
        difference = await self._rerate(operator, tenants)
        self._title(5, "Payments, a dispute and a credit note")
        await self._pay(operator, tenants, stripe)
        self._title(6, "The proof of a line, down to one record")
        proof = await self._explain(tenants[2])
        self._title(7, "From a line to the model's answer, and back")
        answered = await self._answer(operator)
        self._title(8, "The books")
        books = await self._books(operator, tenants)
        return {
            "synthetic": True,
            "invoices": [
                {"number": t["invoice"]["number"], "total_minor": t["invoice"]["total_minor"]} for t in tenants
            ],
            "corrections_nanos": difference,
            "explained": proof,
            "answered": answered,
            **books,
        }

    async def _price(self, operator: Gateway, **nanos: str) -> None:
        begins = (self._month.begins - timedelta(days=1)).isoformat()
        await operator.post("/api/v1/prices", {"resource": self._model, "nanos_per_unit": nanos, "valid_from": begins})

    async def _tenant(self, operator: Gateway, plan: dict[str, Any]) -> dict[str, Any]:
        tenant: dict[str, Any] = await operator.post(
            "/api/v1/tenants", {"name": f"Synthetic {plan['name'].split()[0]} (demo)"}
        )
        made = await operator.post("/api/v1/plans", plan)
        body = {
            "tenant_id": tenant["id"],
            "plan_id": made["id"],
            "starts_at": self._month.begins.isoformat(),
            "anchor_day": self._anchor,
        }

        async def subscribe() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = await operator.post("/api/v1/subscriptions", body)
            except EngineError as error:
                # The account is opened by an event.
                if "has no account" not in str(error):
                    raise
                return None
            return found

        tenant["subscription"] = await self._wait_for("the account", subscribe)
        self._line(tenant["name"], f"plan {plan['name'].split()[0]}, base fee {plan['base_nanos'] // UNIT} USD")
        return tenant

    async def _use(self, tenants: list[dict[str, Any]]) -> None:
        """Every tenth record is reported twice; the second one must not count."""
        seconds = int((self._month.ends - self._month.begins).total_seconds())
        reported = 0
        async with database(engines_access()["postgres"]["url"], "billing") as billing:
            for tenant in tenants:
                agents = [uuid7() for _ in range(2)]
                async with billing.begin(tenant_id=tenant["id"]) as tx:
                    for n in range(RECORDS):
                        run_id = uuid7()
                        quantities = {
                            "input_tokens": self._random.randrange(500, 20_000),
                            "output_tokens": self._random.randrange(50, 2_000),
                        }
                        record = UsageRecorded(
                            tenant_id=tenant["id"],
                            usage_id=f"{run_id}/1/1",
                            resource=self._model,
                            quantities=quantities,
                            occurred_at=self._month.begins + timedelta(seconds=self._random.randrange(seconds)),
                            run_id=run_id,
                            agent_id=self._random.choice(agents),
                        )
                        for _ in range(1 + (n % 10 == 9)):
                            tx.publish(USAGE_RECORDS, record, key=tenant["id"])
                            reported += 1
        for tenant in tenants:
            async with gateway(self._base_url, tenant["api_key"]) as api:

                async def counted(api: Gateway = api) -> bool:
                    items = (await api.get("/api/v1/billing/usage/summary"))["items"]
                    return bool(sum(item["records"] for item in items) == RECORDS)

                await self._wait_for("the usage", counted)
        self._line("usage", f"{reported} records, {reported - RECORDS * len(tenants)} of them repeats: not counted")

    async def _invoice(self, operator: Gateway, tenant: dict[str, Any]) -> None:
        [draft] = (await operator.post("/api/v1/billing/periods/close", {"tenant_id": tenant["id"]}))["items"]
        invoice = await operator.post(f"/api/v1/invoices/{draft['id']}/finalise")
        tenant["invoice"] = invoice
        self._line(invoice["number"], f"{tenant['name']}: {invoice['total_minor'] / 100:.2f} USD")
        lines = (await operator.get(f"/api/v1/invoices/{invoice['id']}/lines"))["items"]
        self._require(
            sum(line["amount_nanos"] for line in lines) == invoice["subtotal_nanos"], "the lines do not add up"
        )
        for line in lines:
            self._line("", f"  {line['amount_nanos'] / UNIT:>12.6f}  {line['description']}")

    async def _pay(self, operator: Gateway, tenants: list[dict[str, Any]], stripe: StripeStandIn) -> None:
        references = []
        for tenant in tenants[:2]:
            async with gateway(self._base_url, tenant["api_key"]) as api:
                method = await api.post("/api/v1/payment-methods", {"token": f"pm_{uuid7().hex}"})
                path = f"/api/v1/invoices/{tenant['invoice']['id']}/pay"
                answers = [await api.post(path, {"payment_method_id": method["id"]})]
            references.append(answers[0]["payment"]["reference"])
            self._line("stripe", f"{tenant['name']} has paid {tenant['invoice']['number']} (local stand-in)")
        for state in ("needs_response", "lost"):
            # Each event is delivered twice, as Stripe may do.
            body, headers = stripe.signed(stripe.dispute_event(references[1], state, 1000))
            for _ in range(2):
                await self._webhook(body, headers)
        after = await operator.get(f"/api/v1/invoices/{tenants[1]['invoice']['id']}")
        self._require(after["due_minor"] == 1000, f"after the lost dispute {after['due_minor']} is due, not 1000")
        self._line("stripe", f"a dispute of 10.00 USD about {after['number']} was lost; it is due again")
        invoice = tenants[2]["invoice"]
        note = await operator.post(
            f"/api/v1/invoices/{invoice['id']}/credit-notes",
            {"amount_minor": invoice["total_minor"] // 10, "reason": "synthetic: three days without service"},
        )
        rest = invoice["total_minor"] - note["amount_minor"]
        paid = await operator.post(
            f"/api/v1/invoices/{invoice['id']}/received", {"amount_minor": rest, "reference": f"SEPA {uuid7()}"}
        )
        self._require(paid["status"] == "paid", f"the invoice is {paid['status']} after its payment")
        self._line(note["number"], f"{note['amount_minor'] / 100:.2f} USD taken back; the rest came by bank transfer")

    async def _webhook(self, body: bytes, headers: dict[str, str]) -> None:
        async with httpx.AsyncClient(base_url=self._base_url, trust_env=False, timeout=30) as client:
            answer = await client.post("/webhooks/payments/stripe", content=body, headers=headers)
        self._require(answer.status_code == 200, f"the webhook was answered {answer.status_code}: {answer.text}")

    async def _rerate(self, operator: Gateway, tenants: list[dict[str, Any]]) -> int:
        await self._price(operator, input_tokens="180", output_tokens="800")
        total = 0
        for tenant in tenants:
            body = {
                "from": self._month.begins.isoformat(),
                "to": self._month.ends.isoformat(),
                "tenant_id": tenant["id"],
            }
            dry = await operator.post("/api/v1/billing/rerate", body | {"dry_run": True})
            booked = await operator.post("/api/v1/billing/rerate", body | {"dry_run": False})
            again = await operator.post("/api/v1/billing/rerate", body | {"dry_run": False})
            self._require(dry["difference_nanos"] == booked["difference_nanos"], "the dry run shows another difference")
            self._require(again["changed"] == 0, "a repeated run has booked a difference")
            total += booked["difference_nanos"]
            self._line(
                "rerate", f"{tenant['name']}: {booked['changed']} records, {booked['difference_nanos'] / UNIT:.6f} USD"
            )
        return total

    async def _explain(self, tenant: dict[str, Any]) -> dict[str, Any]:
        async with gateway(self._base_url, tenant["api_key"]) as api:
            lines = (await api.get(f"/api/v1/invoices/{tenant['invoice']['id']}/lines"))["items"]
            line = next(line for line in lines if "price book" in line["description"])
            path = f"/api/v1/billing/lines/{line['id']}/explain"
            first = (await api.get(path))["first"]["usage_id"]
            proof = await api.get(path, usage_id=first)
        self._require(proof["equal"] is True, "the line does not equal its records")
        record = proof["record"]
        self._line("line", f"{line['description']}: {line['amount_nanos'] / UNIT:.6f} USD")
        self._line("records", f"{proof['records']['count']}, hash {proof['records']['hash']}, as the sums say")
        parts = " + ".join(f"{part['quantity']} {part['unit']} × {part['nanos_per_unit']}" for part in record["parts"])
        self._line("one record", f"{parts} = {record['usage']['amount_nanos']} nano-USD")
        self._line("answer", f"{record['answer']}, step {record['step']} (synthetic: this run does not exist)")
        return {"line_id": line["id"], "usage_id": first, "records": proof["records"]["count"]}

    async def _answer(self, operator: Gateway) -> dict[str, str]:
        """A real run of the scripted model: its invoice line leads to the answer, and the run's charge to the line."""
        tenant = await self._tenant(operator, _plans(self._random.randrange(10**9))[2] | {"base_nanos": 0})
        async with gateway(self._base_url, tenant["api_key"]) as api:
            body = {"name": "Helper", "model": "scripted/answer", "system_prompt": "You answer briefly."}
            agent = await api.post("/api/v1/agents", body)
            path = f"/api/v1/agents/{agent['id']}/sessions/demo/messages"
            run_id = (await api.post(path, {"text": "How long is a month?"}))["run_id"]

            async def charged() -> dict[str, Any] | None:
                found: dict[str, Any] = await api.get(f"/api/v1/runs/{run_id}")
                return found if found["status"] == "completed" and found["cost_nanos"] else None

            run = await self._wait_for("the charge of the run", charged)
            timeline = (await api.get(f"/api/v1/runs/{run_id}/timeline"))["items"]
            usage_id = next(
                item["data"]["usage_id"]
                for item in timeline
                if item["kind"] == "charge" and item["data"]["resource"] == "scripted/answer"
            )
            await operator.call("DELETE", f"/api/v1/subscriptions/{tenant['subscription']['id']}?when=now")
            await operator.post("/api/v1/billing/periods/close", {"tenant_id": tenant["id"]})
            [line] = (await api.get(f"/api/v1/billing/verdicts/{usage_id}"))["lines"]
            self._line("line", line["description"])
            record = (await api.get(f"/api/v1/billing/lines/{line['id']}/explain", usage_id=usage_id))["record"]
            answer = await api.get(record["answer"])
        self._require(answer["id"] == run_id and answer["reply"] == run["reply"], "the line leads to another answer")
        self._line("answer", f"{record['answer']}: {answer['reply']}")
        self._line("and back", f"the run's charge {usage_id} is in this line")
        return {"line_id": line["id"], "usage_id": usage_id, "run_id": run_id}

    async def _books(self, operator: Gateway, tenants: list[dict[str, Any]]) -> dict[str, Any]:
        due = 0
        for tenant in tenants:
            journal = await operator.get("/api/v1/billing/journal", tenant_id=tenant["id"])
            invoice = await operator.get(f"/api/v1/invoices/{tenant['invoice']['id']}")
            self._require(journal["difference"] == 0, "the journal is not balanced")
            open_nanos = journal["balances"].get("receivable", 0)
            self._require(
                open_nanos == invoice["due_minor"] * UNIT // 100,
                "the receivable is not the amount that is due by the invoice",
            )
            due += open_nanos
        payments = await operator.get("/api/v1/payments/reconciliation")
        self._require(payments["difference"] == 0, f"the payments differ from the journal: {payments}")

        produced = 0
        for tenant in tenants:
            async with gateway(self._base_url, tenant["api_key"]) as api:

                async def usage(api: Gateway = api) -> dict[str, Any] | None:
                    found: dict[str, Any] = await api.get("/api/v1/billing/reconciliation")
                    return found if found["difference"] == 0 and found["pending"] == 0 else None

                found = await self._wait_for("equal amounts in usage and charges", usage)
            self._require(found["counted"] == RECORDS, f"{found['counted']} records are counted, not {RECORDS}")
            produced += found["produced"]
        self._line("journal", "balanced for each tenant; receivables equal the amounts that are due by the invoices")
        self._line("payments", "difference 0 between the provider's money and the journal")
        self._line("usage", f"{produced} records produced, difference 0")
        return {"due_nanos": due, "journal_difference": 0, "payments_difference": 0, "usage_difference": 0}


def _plans(unique: int) -> list[dict[str, Any]]:
    common = {"currency": "USD", "interval": "month"}
    return [
        common
        | {
            "name": f"Starter {unique}",
            "base_nanos": 0,
            "included": [{"meter": "input_tokens", "quantity": 1_000_000}],
            "charges": [
                {"meter": "input_tokens", "scheme": "per_unit", "tiers": [{"unit_nanos": 5_000}]},
                {"meter": "output_tokens", "scheme": "per_unit", "tiers": [{"unit_nanos": 20_000}]},
            ],
        },
        common
        | {
            "name": f"Team {unique}",
            "base_nanos": 49 * UNIT,
            "charges": [
                {
                    "meter": "input_tokens",
                    "by": "agent",
                    "scheme": "graduated",
                    "tiers": [{"up_to": 500_000, "unit_nanos": 4_000}, {"unit_nanos": 3_000}],
                },
                {
                    "meter": "output_tokens",
                    "scheme": "package",
                    "package_size": 100_000,
                    "tiers": [{"unit_nanos": UNIT}],
                },
            ],
        },
        common | {"name": f"Enterprise {unique}", "base_nanos": 500 * UNIT, "usage_markup_percent": 15},
    ]
