"""Stripe: payment intents, refunds, disputes (docs.stripe.com/api), webhooks (docs.stripe.com/webhooks/signature)."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from pydantic import SecretStr

from infra.errors import Conflict, InvalidMessage, Transient, Unauthenticated
from infra.outgoing.client import Answer, Outgoing
from services.billing.payments.provider import CANCELLED, EventKind, Intent, PaymentRequest, ProviderEvent
from services.billing.rating.currencies import DIGITS, format_minor

# Stripe's own limit. An older call could be a recorded one.
TOLERANCE_SECONDS = 300
_DISPUTES: dict[str, EventKind] = {"won": "dispute_won", "lost": "dispute_lost", "prevented": "dispute_lost"}


# docs.stripe.com/currencies, special cases: ISK and UGX have two digits there and none in ISO 4217; MGA the reverse.
# With three digits, the last one must be 0.
_HUNDREDFOLD, _HUNDREDTH = ("ISK", "UGX"), ("MGA",)


def amount_of(minor: int, currency: str) -> int:
    """Stripe's amount for minor units of ISO 4217. Raises Conflict if Stripe cannot express it."""
    if currency in _HUNDREDFOLD:
        return minor * 100
    least = 100 if currency in _HUNDREDTH else 10 if DIGITS[currency] == 3 else 1
    if minor % least:
        raise Conflict(
            f"stripe takes only multiples of {format_minor(least, currency)} {currency}; "
            "the amount must be paid in another way"
        )
    return minor // 100 if currency in _HUNDREDTH else minor


def minor_of(amount: int, currency: str) -> int:
    """Minor units of ISO 4217 for Stripe's amount."""
    return amount // 100 if currency in _HUNDREDFOLD else amount * 100 if currency in _HUNDREDTH else amount


class _Error(msgspec.Struct, frozen=True):
    message: str = ""
    param: str = ""


class _Failure(msgspec.Struct, frozen=True):
    error: _Error = _Error()


class Stripe:
    """One account of Stripe."""

    name = "stripe"

    def __init__(self, outgoing: Outgoing, origin: str, key: SecretStr, webhook_secret: SecretStr) -> None:
        self._outgoing = outgoing
        self._origin = origin
        self._key = key
        self._secret = webhook_secret

    async def save(self, tenant_id: str, token: str, customer: str) -> tuple[str, str]:
        answer = await self._attach(token, customer) if customer else None
        # The customer may be deleted, or of another account at Stripe.
        if answer is None or _error(answer).param == "customer":
            # Stripe gives the answer to a known key again.
            key = f"customer {tenant_id} {customer}".strip()
            customer = str(_ok(await self._call("customers", {"metadata[tenant_id]": tenant_id}, key))["id"])
            answer = await self._attach(token, customer)
        if answer.status in (400, 402, 404):
            raise InvalidMessage("token", f"was refused by stripe: {_reason(answer)}")
        return customer, str(_ok(answer)["id"])

    async def _attach(self, token: str, customer: str) -> Answer:
        return await self._call(f"payment_methods/{token}/attach", {"customer": customer}, None)

    async def remove(self, method: str) -> None:
        answer = await self._call(f"payment_methods/{method}/detach", {}, None)
        # 400: it is not attached any more. 404: its customer was deleted.
        if answer.status not in (400, 404):
            _ok(answer)

    async def forget(self, customer: str) -> None:
        answer = await self._call(f"customers/{customer}", None, None, method="DELETE")
        if answer.status != 404:
            _ok(answer)

    async def prepare(self, request: PaymentRequest) -> Intent:
        try:
            amount = amount_of(request.amount_minor, request.currency)
        except Conflict as error:
            return Intent("", "failed", 0, str(error), "")
        fields = {
            "amount": str(amount),
            "currency": request.currency.lower(),
            "description": request.description,
            "metadata[payment_id]": str(request.payment_id),
        }
        if request.method:
            fields |= {"customer": request.customer, "payment_method": request.method}
        answer = await self._call("payment_intents", fields, str(request.payment_id))
        if answer.status == 400:
            # Such as an amount below its least. A payment that it has made before is answered again with 200.
            return Intent("", "failed", 0, _refusal(answer), "")
        return _intent(_ok(answer))

    async def charge(self, reference: str, request: PaymentRequest) -> Intent:
        key = f"{request.payment_id} confirm"
        answer = await self._call(f"payment_intents/{reference}/confirm", {"off_session": "true"}, key)
        if answer.status == 402:
            return Intent(reference, "failed", 0, _reason(answer), "")
        if answer.status == 400:
            # It was charged more than a day ago, when Stripe has forgotten the key, or cannot be charged.
            ended = await self.cancel(reference)
            return ended._replace(failure=_refusal(answer)) if ended.status == "failed" else ended
        return _intent(_ok(answer))

    async def look(self, reference: str) -> Intent:
        answer = await self._call(f"payment_intents/{reference}", None, None)
        if answer.status == 404:
            # It was made with another account at Stripe.
            return Intent(reference, "failed", 0, _refusal(answer), "")
        return _intent(_ok(answer))

    async def cancel(self, reference: str) -> Intent:
        answer = await self._call(f"payment_intents/{reference}/cancel", {}, None)
        if answer.status in (400, 404):
            # It has succeeded, was cancelled before, is being processed, or is not known.
            return await self.look(reference)
        return _intent(_ok(answer))

    async def refund(self, reference: str, minor: int, currency: str, key: UUID) -> None:
        fields = {
            "payment_intent": reference,
            "amount": str(amount_of(minor, currency)),
            "metadata[refund_id]": str(key),
        }
        answer = await self._call("refunds", fields, str(key))
        if answer.status in (400, 402, 404):
            raise Conflict(f"stripe refused the refund: {_reason(answer)}")
        _ok(answer)

    async def has_refund(self, reference: str, key: UUID) -> bool:
        # The newest first. The largest page has 100.
        made = _ok(await self._call(f"refunds?payment_intent={reference}&limit=100", None, None))["data"]
        return any((refund.get("metadata") or {}).get("refund_id") == str(key) for refund in made)

    def event(self, headers: Mapping[str, str], body: bytes, now: datetime) -> ProviderEvent:
        self._verify(headers.get("stripe-signature", ""), body, now)
        try:
            event = msgspec.json.decode(body)
            return _read(str(event["id"]), str(event["type"]), event["data"]["object"])
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidMessage("body", "is not an event of Stripe") from error

    def _verify(self, header: str, body: bytes, now: datetime) -> None:
        parts = [part.partition("=")[::2] for part in header.split(",")]
        stamp = next((value for name, value in parts if name.strip() == "t"), "")
        if not stamp.isascii() or not stamp.isdecimal() or len(stamp) > 12:
            raise Unauthenticated("stripe-signature: is missing or malformed")
        signed = hmac.new(self._secret.get_secret_value().encode(), stamp.encode() + b"." + body, hashlib.sha256)
        found = [value for name, value in parts if name.strip() == "v1" and value.isascii()]
        if not any(hmac.compare_digest(signed.hexdigest(), value) for value in found):
            raise Unauthenticated("stripe-signature: is wrong")
        if abs(now.timestamp() - int(stamp)) > TOLERANCE_SECONDS:
            raise Unauthenticated(f"stripe-signature: is more than {TOLERANCE_SECONDS} seconds old")

    async def _call(
        self, path: str, fields: Mapping[str, str] | None, key: str | None, *, method: str = "GET"
    ) -> Answer:
        """Sends `fields`; without any it reads, or uses `method`."""
        headers = {"authorization": f"Bearer {self._key.get_secret_value()}"}
        if fields is not None:
            headers["content-type"] = "application/x-www-form-urlencoded"
        if key:
            headers["idempotency-key"] = key
        answer = await self._outgoing.request(
            method if fields is None else "POST",
            f"{self._origin}/v1/{path}",
            headers=headers,
            content=None if fields is None else urlencode(fields).encode(),
            template=f"/v1/{re.split('[/?]', path)[0]}",
        )
        # 409: another request with the key is running. Both pass by themselves.
        if answer.status in (409, 429) or answer.status >= 500:
            raise Transient(f"stripe answered {answer.status}")
        return answer


def _intent(made: dict[str, Any]) -> Intent:
    reference = str(made["id"])
    match made["status"]:
        case "succeeded":
            received = minor_of(int(made["amount_received"]), str(made["currency"]).upper())
            return Intent(reference, "succeeded", received, "", "")
        case "canceled":
            return Intent(reference, "failed", 0, CANCELLED, "")
    secret = str(made.get("client_secret") or "")
    # Before the first attempt it has this status, too, and no error.
    if made["status"] == "requires_payment_method" and made.get("last_payment_error"):
        return Intent(reference, "declined", 0, _decline(made), secret)
    return Intent(reference, "pending", 0, "", secret)


def _decline(intent: dict[str, Any]) -> str:
    return str((intent.get("last_payment_error") or {}).get("message") or "the payment failed")


def _ok(answer: Answer) -> dict[str, Any]:
    if answer.status != 200:
        raise Conflict(f"stripe answered {answer.status}: {_reason(answer)}")
    body: dict[str, Any] = msgspec.json.decode(answer.body)
    return body


def _refusal(answer: Answer) -> str:
    return f"refused by stripe: {_reason(answer)}"


def _reason(answer: Answer) -> str:
    return _error(answer).message or f"HTTP {answer.status}"


def _error(answer: Answer) -> _Error:
    try:
        return msgspec.json.decode(answer.body, type=_Failure).error
    except msgspec.DecodeError:
        return _Error()


def _read(id_: str, type_: str, thing: dict[str, Any]) -> ProviderEvent:
    kind: EventKind = "ignored"
    reference, minor, detail, movements = str(thing.get("payment_intent") or ""), 0, "", 0
    match type_:
        case "payment_intent.succeeded":
            kind, reference, minor = "succeeded", str(thing["id"]), int(thing["amount_received"])
        case "payment_intent.payment_failed":
            kind, reference = "declined", str(thing["id"])
            detail = _decline(thing)
        case "payment_intent.canceled":
            kind, reference, detail = "failed", str(thing["id"]), CANCELLED
        case "charge.refunded":
            kind, minor = "refunded", int(thing["amount_refunded"])
        case "refund.created" | "refund.updated" | "refund.failed" | "charge.refund.updated":
            kind = "refund_failed" if thing["status"] in ("failed", "canceled") else "refund"
            minor, detail = int(thing["amount"]), str(thing["id"])
        case _ if type_.startswith("charge.dispute."):
            # An inquiry (warning_…) takes no money. If it becomes a dispute, that is an update.
            if not (state := str(thing["status"])).startswith("warning_"):
                kind, detail = _DISPUTES.get(state, "dispute_open"), str(thing["id"])
                minor, movements = _withdrawn(thing), len(thing["balance_transactions"])
    metadata = thing.get("metadata") or {}
    payment_id, refund_id = (str(metadata.get(name) or "") for name in ("payment_id", "refund_id"))
    currency = str(thing.get("currency") or "").upper()
    return ProviderEvent(
        id_, kind, reference, payment_id, minor_of(minor, currency), currency, detail, refund_id, movements
    )


def _withdrawn(dispute: dict[str, Any]) -> int:
    """The amount that is withdrawn for a dispute now, fees not included."""
    total = 0
    for movement in dispute["balance_transactions"]:
        amount, whole = int(movement["amount"]), int(dispute["amount"])
        # An account in another currency than the payment's: each movement was converted by the rate of its day.
        if movement["currency"] != dispute["currency"]:
            amount = whole if amount > 0 else -whole
        total -= amount
    return total
