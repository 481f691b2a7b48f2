"""A fake of api.stripe.com for payment intents, methods, refunds and disputes, and its signed events
(https://docs.stripe.com/api). It is strict about the fields that it knows and refuses all others."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from copy import deepcopy
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import msgspec

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn

DECLINED = "pm_card_declined"
"""A method whose payments are declined."""

_INTENT_FIELDS = {
    "amount",
    "currency",
    "description",
    "metadata[payment_id]",
    "customer",
    "payment_method",
}


class StripeStandIn(StandIn):
    """One account."""

    def __init__(self) -> None:
        super().__init__()
        self.key = f"rk_test_{secrets.token_hex(12)}"
        self.webhook_secret = f"whsec_{secrets.token_hex(16)}"
        self.intents: dict[str, dict[str, Any]] = {}
        self.customers: set[str] = set()
        self.methods: dict[str, str] = {}
        """Method → customer."""
        self.detached: set[str] = set()
        """Methods that cannot be attached again."""
        self.refunded: dict[str, int] = {}
        """Intent → sum of its refunds."""
        self.refunds: dict[str, dict[str, Any]] = {}
        self.disputes: dict[str, dict[str, Any]] = {}
        """Intent → its dispute."""
        self._answers: dict[str, tuple[str, Reply]] = {}

    @property
    def received(self) -> int:
        """The sum of all payments in minor units, refunds not taken off."""
        return sum(intent["amount_received"] for intent in self.intents.values())

    def forget_keys(self) -> None:
        """A day passes: the keys of requests may be used again."""
        self._answers.clear()

    def signed(self, event: dict[str, Any], *, at: float | None = None) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a webhook call (https://docs.stripe.com/webhooks/signature)."""
        body = msgspec.json.encode(event)
        stamp = str(int(time.time() if at is None else at))
        signature = hmac.new(self.webhook_secret.encode(), f"{stamp}.".encode() + body, hashlib.sha256).hexdigest()
        return body, {"content-type": "application/json", "stripe-signature": f"t={stamp},v1={signature}"}

    def event(self, kind: str, thing: dict[str, Any], id_: str = "") -> dict[str, Any]:
        return {
            "id": id_ or f"evt_{secrets.token_hex(8)}",
            "object": "event",
            "api_version": "2025-09-30.clover",
            "created": int(time.time()),
            "livemode": False,
            "type": kind,
            "data": {"object": thing},
        }

    def succeeded(self, intent_id: str) -> dict[str, Any]:
        """The payer has completed the payment: the event of it."""
        intent = self.intents[intent_id]
        assert intent["status"] != "canceled", "a payer cannot complete a cancelled payment"
        intent |= {"status": "succeeded", "amount_received": intent["amount"]}
        return self.event("payment_intent.succeeded", intent)

    def refund_event(self, intent_id: str) -> dict[str, Any]:
        intent = self.intents[intent_id]
        charge = {
            "id": f"ch_{intent_id[3:]}",
            "object": "charge",
            "payment_intent": intent_id,
            "amount": intent["amount"],
            "amount_refunded": self.refunded.get(intent_id, 0),
            "currency": intent["currency"],
            "metadata": {},
        }
        return self.event("charge.refunded", charge)

    def dispute_event(self, intent_id: str, status: str, amount: int | None = None) -> dict[str, Any]:
        """A step of a dispute, whose first one withdraws the money. `status`: needs_response, under_review, won, lost
        or prevented."""
        intent = self.intents[intent_id]
        dispute = self.disputes.setdefault(
            intent_id,
            {
                "id": f"dp_{intent_id[3:]}",
                "object": "dispute",
                "payment_intent": intent_id,
                "amount": intent["amount"] if amount is None else amount,
                "currency": intent["currency"],
                "metadata": {},
                "balance_transactions": [],
            },
        )
        dispute["status"] = status
        if not dispute["balance_transactions"]:
            _move(dispute, -dispute["amount"])
        kind = "created" if status == "needs_response" else "updated" if status == "under_review" else "closed"
        return self.event(f"charge.dispute.{kind}", deepcopy(dispute))

    def reinstated(self, intent_id: str, amount: int | None = None) -> dict[str, Any]:
        """The event of money of a dispute that comes back. It may have any status."""
        dispute = self.disputes[intent_id]
        _move(dispute, dispute["amount"] if amount is None else amount)
        return self.event("charge.dispute.funds_reinstated", deepcopy(dispute))

    def handle(self, call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {self.key}":
            _refuse(401, "Invalid API Key provided")
        if call.method == "GET":
            if call.path.startswith("/v1/refunds?"):
                return self._listed(dict(parse_qsl(call.path.partition("?")[2], strict_parsing=True)))
            intent = self.intents.get(call.path.removeprefix("/v1/payment_intents/"))
            return Reply(200, intent) if intent else _refuse(404, "No such payment_intent")
        if call.method == "DELETE":
            return self._delete(call.path.removeprefix("/v1/customers/"))
        if call.headers.get("content-type") != "application/x-www-form-urlencoded":
            _refuse(400, "the body must be form-encoded")
        pairs = parse_qsl(call.body.decode(), strict_parsing=True, keep_blank_values=True)
        fields = dict(pairs)
        if len(fields) != len(pairs):
            _refuse(400, "a field is there twice")
        key = call.headers.get("idempotency-key")
        if key is None:
            return self._do(call, fields)
        content = f"{call.path} {sorted(pairs)}"
        if key in self._answers:
            before, reply = self._answers[key]
            if before != content:
                _refuse(
                    400, "Keys for idempotent requests can only be used with the same parameters", "idempotency_error"
                )
            return reply
        try:
            reply = self._do(call, fields)
        except Refused as refused:
            reply = refused.reply
            self.refusals.append(f"{reply.status} {reply.body}")
        # A repeated request gets the first answer, also if the intent has changed since.
        reply = reply._replace(body=deepcopy(reply.body))
        self._answers[key] = (content, reply)
        return reply

    def _do(self, call: Call, fields: dict[str, str]) -> Reply:
        match [part for part in call.path.split("/") if part]:
            case ["v1", "customers"]:
                _only(fields, {"metadata[tenant_id]"})
                customer = f"cus_{secrets.token_hex(7)}"
                self.customers.add(customer)
                return Reply(200, {"id": customer, "object": "customer"})
            case ["v1", "payment_methods", method, "attach"]:
                _only(fields, {"customer"})
                if not method.startswith("pm_"):
                    _refuse(404, f"No such PaymentMethod: '{method}'")
                self._check_attached(method)
                if fields["customer"] not in self.customers:
                    _refuse(400, f"No such customer: '{fields['customer']}'", param="customer")
                self.methods[method] = fields["customer"]
                return Reply(200, {"id": method, "object": "payment_method", "customer": fields["customer"]})
            case ["v1", "payment_methods", method, "detach"]:
                _only(fields, set())
                if method not in self.methods:
                    _refuse(400, "The payment method you provided is not attached to a customer.")
                del self.methods[method]
                self.detached.add(method)
                return Reply(200, {"id": method, "object": "payment_method", "customer": None})
            case ["v1", "payment_intents"]:
                return self._intent(fields)
            case ["v1", "payment_intents", intent_id, "confirm" | "cancel" as act] if intent_id in self.intents:
                return self._confirm(intent_id, fields) if act == "confirm" else self._cancel(intent_id, fields)
            case ["v1", "refunds"]:
                return self._refund(fields)
        _refuse(404, f"Unrecognized request URL ({call.method}: {call.path})")

    def _delete(self, customer: str) -> Reply:
        if customer not in self.customers:
            _refuse(404, f"No such customer: '{customer}'")
        self.customers.remove(customer)
        for method in [method for method, owner in self.methods.items() if owner == customer]:
            del self.methods[method]
            self.detached.add(method)
        return Reply(200, {"id": customer, "object": "customer", "deleted": True})

    def _intent(self, fields: dict[str, str]) -> Reply:
        _only(fields, _INTENT_FIELDS)
        amount = int(fields["amount"])
        if amount <= 0 or fields["currency"] != fields["currency"].lower():
            _refuse(400, "Invalid amount or currency")
        # docs.stripe.com/currencies, special cases.
        if amount % {"isk": 100, "ugx": 100, "kwd": 10}.get(fields["currency"], 1):
            _refuse(400, "Invalid amount: the currency takes no such fraction")
        intent: dict[str, Any] = {
            "id": f"pi_{secrets.token_hex(10)}",
            "object": "payment_intent",
            "amount": amount,
            "amount_received": 0,
            "currency": fields["currency"],
            "metadata": {"payment_id": fields["metadata[payment_id]"]},
            "status": "requires_payment_method",
            "last_payment_error": None,
        }
        intent["client_secret"] = f"{intent['id']}_secret_{secrets.token_hex(8)}"
        if method := fields.get("payment_method"):
            if self.methods.get(method) != fields.get("customer"):
                _refuse(400, "The payment method does not belong to the customer")
            intent |= {"status": "requires_confirmation", "payment_method": method}
        self.intents[intent["id"]] = intent
        return Reply(200, intent)

    def _confirm(self, intent_id: str, fields: dict[str, str]) -> Reply:
        _only(fields, {"off_session"})
        intent = self.intents[intent_id]
        if intent["status"] != "requires_confirmation":
            _unexpected("confirm", intent)
        self._check_attached(intent["payment_method"])
        if intent["payment_method"] == DECLINED:
            error = {"type": "card_error", "code": "card_declined", "message": "Your card was declined."}
            intent |= {"status": "requires_payment_method", "payment_method": None, "last_payment_error": error}
            raise Refused(Reply(402, {"error": error | {"payment_intent": intent}}))
        intent |= {"status": "succeeded", "amount_received": intent["amount"]}
        return Reply(200, intent)

    def _check_attached(self, method: str) -> None:
        if method in self.detached:
            _refuse(400, "This PaymentMethod was detached from a Customer, and may not be used again.")

    def _cancel(self, intent_id: str, fields: dict[str, str]) -> Reply:
        _only(fields, set())
        intent = self.intents[intent_id]
        if intent["status"] in ("succeeded", "canceled", "processing"):
            _unexpected("cancel", intent)
        intent |= {"status": "canceled", "canceled_at": int(time.time())}
        return Reply(200, intent)

    def _refund(self, fields: dict[str, str]) -> Reply:
        _only(fields, {"payment_intent", "amount", "metadata[refund_id]"})
        intent = self.intents.get(fields["payment_intent"])
        if intent is None:
            _refuse(404, f"No such payment_intent: '{fields['payment_intent']}'")
        minor = int(fields["amount"])
        left = intent["amount_received"] - self.refunded.get(intent["id"], 0)
        if not 0 < minor <= left:
            _refuse(400, f"Refund amount ({minor}) is greater than unrefunded amount on charge ({left})")
        return Reply(200, self.give_back(intent["id"], minor, fields.get("metadata[refund_id]")))

    def _listed(self, fields: dict[str, str]) -> Reply:
        _only(fields, {"payment_intent", "limit"})
        found = [refund for refund in self.refunds.values() if refund["payment_intent"] == fields["payment_intent"]]
        newest = found[::-1][: int(fields["limit"])]
        return Reply(200, {"object": "list", "has_more": len(found) > len(newest), "data": newest})

    def give_back(self, intent_id: str, minor: int, refund_id: str | None = None) -> dict[str, Any]:
        """Makes a refund; by hand if it has no id of ours."""
        self.refunded[intent_id] = self.refunded.get(intent_id, 0) + minor
        refund = {
            "id": f"re_{secrets.token_hex(8)}",
            "object": "refund",
            "amount": minor,
            "currency": self.intents[intent_id]["currency"],
            "payment_intent": intent_id,
            "status": "succeeded",
            "metadata": {"refund_id": refund_id} if refund_id else {},
        }
        self.refunds[refund["id"]] = refund
        return refund

    def fail_refund(self, refund: dict[str, Any]) -> dict[str, Any]:
        """The payer's bank sends the refund back: the event of it."""
        self.refunded[refund["payment_intent"]] -= refund["amount"]
        refund |= {"status": "failed", "failure_reason": "expired_or_canceled_card"}
        return self.event("refund.failed", refund)


def _move(dispute: dict[str, Any], amount: int) -> None:
    movement = {
        "id": f"txn_{secrets.token_hex(8)}",
        "object": "balance_transaction",
        "amount": amount,
        "currency": dispute["currency"],
        "fee": 1500 if amount < 0 else 0,
        "type": "adjustment",
    }
    dispute["balance_transactions"].append(movement)


def _only(fields: dict[str, str], known: set[str]) -> None:
    if unknown := sorted(fields.keys() - known):
        _refuse(400, f"Received unknown parameter: {unknown[0]}")


def _unexpected(act: str, intent: dict[str, Any]) -> NoReturn:
    message = f"You cannot {act} this PaymentIntent because it has a status of {intent['status']}."
    error = {"type": "invalid_request_error", "code": "payment_intent_unexpected_state", "message": message}
    raise Refused(Reply(400, {"error": error | {"payment_intent": intent}}))


def _refuse(status: int, message: str, type_: str = "invalid_request_error", param: str | None = None) -> NoReturn:
    raise Refused(Reply(status, {"error": {"type": type_, "message": message} | ({"param": param} if param else {})}))
