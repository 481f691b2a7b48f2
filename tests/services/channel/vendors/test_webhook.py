"""The ``webhook`` adapter. The library of Standard Webhooks judges both directions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from standardwebhooks import Webhook as Judge

from infra.clock import utcnow
from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unanswered, Unauthenticated
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import AccountRefused, Outbound, Request
from services.channel.vendors.items import Inbound
from services.channel.vendors.webhook import Webhook, WebhookCredentials
from tooling.testing.vendors import Fault, WebhookStandIn, answer, cut
from tooling.testing.vendors.server import Call, Reply

CREDENTIALS = WebhookCredentials("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "https://example.com/replies")
BODY = '{"conversation_id":"c1","user_id":"u1","text":"größer 😀"}'


def receive(id_: str, at: datetime, signature: str, body: str = BODY) -> Inbound:
    headers = {
        "webhook-id": id_,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": signature,
    }
    [item] = Webhook().receive(Request("POST", "", headers, body.encode()), CREDENTIALS, utcnow()).items
    assert isinstance(item, Inbound)
    return item


def test_the_judges_signature_is_accepted_among_others() -> None:
    now = datetime.now(UTC)
    signature = Judge(CREDENTIALS.secret).sign("msg_1", now, BODY)
    item = receive("msg_1", now, f"v1,AAAA v1a,BBBB {signature}")
    assert item == Inbound(("msg_1",), "c1", "u1", "msg_1", "größer 😀")


def test_another_id_body_or_key_is_refused() -> None:
    now = datetime.now(UTC)
    signature = Judge(CREDENTIALS.secret).sign("msg_1", now, BODY)
    other = Judge("whsec_" + "B" * 32).sign("msg_1", now, BODY)
    for id_, given, body in (
        ("msg_2", signature, BODY),
        ("msg_1", signature, BODY + " "),
        ("msg_1", other, BODY),
        ("msg_1", "", BODY),
        ("", signature, BODY),
    ):
        with pytest.raises(Unauthenticated):
            receive(id_, now, given, body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"conversation_id":"c1","user_id":"u1","text":7}', "text"),
        ('{"conversation_id":"c1","user_id":"u1","attachments":[{"name":"a"}]}', "attachments[0].url"),
        ('{"conversation_id":7,"user_id":"u1","text":"hi"}', "conversation_id"),
        ('{"conversation_id":"a\\u0000b","user_id":"u1","text":"hi"}', "conversation_id"),
        ('{"conversation_id":"c1","user_id":"","text":"hi"}', "user_id"),
        ("[]", "body"),
        ("{", "body"),
    ],
)
def test_a_signed_body_of_another_shape_is_refused_with_its_field(body: str, field: str) -> None:
    now = datetime.now(UTC)
    with pytest.raises(InvalidMessage) as raised:
        receive("msg_1", now, Judge(CREDENTIALS.secret).sign("msg_1", now, body), body)
    assert raised.value.field == field


def test_files_are_attachments() -> None:
    now = datetime.now(UTC)
    files = '[{"url":"https://e.example/a","name":"a.png","content_type":"image/png"}]'
    body = f'{{"conversation_id":"c1","user_id":"u1","attachments":{files}}}'
    item = receive("msg_1", now, Judge(CREDENTIALS.secret).sign("msg_1", now, body), body)
    assert (item.text, item.attachments) == ("", (Attachment("image", "https://e.example/a", "a.png"),))


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(InvalidMessage) as raised:
        WebhookCredentials("whsec_c2hvcnQ=", "https://example.com")
    assert raised.value.field == "secret"


class Judged(WebhookStandIn):
    """Verifies each reply with the library."""

    def handle(self, call: Call) -> Reply:
        Judge(self.credentials["secret"]).verify(call.body.decode(), dict(call.headers))
        return super().handle(call)


@pytest.fixture
async def vendor() -> AsyncIterator[Judged]:
    async with Judged() as running:
        yield running


async def send(vendor: WebhookStandIn, outgoing: Outgoing, key: str = "d1") -> str | None:
    message = Outbound(key, "c1", "größer 😀", run_id=UUID(int=7))
    return await Webhook().send(outgoing, "", WebhookCredentials(**vendor.credentials), message)


async def test_a_reply_is_signed_and_sent_again_under_the_same_id(vendor: Judged, outgoing: Outgoing) -> None:
    for _ in range(2):
        assert await send(vendor, outgoing) is None
    [message] = vendor.ledger
    assert message.id == "d1"
    assert json.loads(json.dumps(message.fields)) == {
        "conversation_id": "c1",
        "text": "größer 😀",
        "run_id": str(UUID(int=7)),
    }
    assert vendor.repeats == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (answer(410), AccountRefused),
        (answer(400), EffectFailed),
        (answer(302, location="http://127.0.0.1/"), EffectFailed),
        (answer(429), RetryLater),
        (answer(503, retry_after="7"), RetryLater),
        (answer(500), Transient),
        (cut(accept=True), Unanswered),
    ],
)
async def test_permanent_transient_and_unknown_errors_are_distinguished(
    vendor: Judged, outgoing: Outgoing, fault: Fault, error: type[Exception]
) -> None:
    vendor.faults.append(fault)
    with pytest.raises(error) as raised:
        await send(vendor, outgoing)
    assert type(raised.value) is error
