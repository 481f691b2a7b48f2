"""Standard Webhooks, checked with the specification's own package."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta

import pytest
from standardwebhooks import Webhook

from infra.errors import InvalidMessage, Unauthenticated
from infra.outgoing.webhooks import sign, verify

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
ID = "msg_p5jXN8AQM9LWM0D4loKWxJek"
AT = datetime.fromtimestamp(1614265330, UTC)
BODY = b'{"test": 2432232314}'
SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
HEADERS = {"webhook-id": ID, "webhook-timestamp": "1614265330", "webhook-signature": SIGNATURE}


def test_the_published_vector_is_signed_and_verified() -> None:
    assert sign(SECRET, ID, AT, BODY) == HEADERS
    assert verify(SECRET, HEADERS, BODY, AT) == ID


def test_the_reference_accepts_what_is_signed_here_and_the_other_way_round() -> None:
    now = datetime.now(UTC)
    body = '{"text": "ünï “”"}'.encode()
    secret = "whsec_" + base64.b64encode(bytes(range(64))).decode()
    reference = Webhook(secret)
    reference.verify(body.decode(), sign(secret, "msg_1", now, body))
    theirs = {
        "webhook-id": "msg_2",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": reference.sign("msg_2", now, body.decode()),
    }
    assert verify(secret, theirs, body, now) == "msg_2"


def test_one_fitting_signature_of_several_is_enough() -> None:
    other = "v1," + base64.b64encode(bytes(32)).decode()
    several = HEADERS | {"webhook-signature": f"{other} v1a,AAAA {SIGNATURE}"}
    assert verify(SECRET, several, BODY, AT) == ID


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"webhook-id": ""}, "webhook-id"),
        ({"webhook-id": "msg_other"}, "webhook-signature"),
        ({"webhook-timestamp": ""}, "webhook-timestamp"),
        ({"webhook-timestamp": "1614265331"}, "webhook-signature"),
        ({"webhook-timestamp": "1614265330.5"}, "webhook-timestamp"),
        ({"webhook-timestamp": "-1"}, "webhook-timestamp"),
        ({"webhook-timestamp": "²"}, "webhook-timestamp"),
        ({"webhook-timestamp": "1" * 100_000}, "webhook-timestamp"),
        ({"webhook-signature": ""}, "webhook-signature"),
        ({"webhook-signature": SIGNATURE.replace("v1,", "v1a,")}, "webhook-signature"),
        ({"webhook-signature": SIGNATURE.removeprefix("v1,")}, "webhook-signature"),
        ({"webhook-signature": "v1,ünï"}, "webhook-signature"),
    ],
)
def test_headers_that_do_not_fit_are_refused(changed: dict[str, str], named: str) -> None:
    with pytest.raises(Unauthenticated, match=named) as refused:
        verify(SECRET, HEADERS | changed, BODY, AT)
    assert "g0hM9" not in str(refused.value)


def test_another_body_is_refused() -> None:
    with pytest.raises(Unauthenticated):
        verify(SECRET, HEADERS, BODY + b" ", AT)


@pytest.mark.parametrize("sign_of_time", [1, -1])
def test_a_signature_more_than_five_minutes_old_or_early_is_refused(sign_of_time: int) -> None:
    assert verify(SECRET, HEADERS, BODY, AT + sign_of_time * timedelta(seconds=300)) == ID
    with pytest.raises(Unauthenticated, match="webhook-timestamp"):
        verify(SECRET, HEADERS, BODY, AT + sign_of_time * timedelta(seconds=301))


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!", "whsec_c2hvcnQ=", "whsec_" + "A" * 88 + "AAAA"])
def test_a_weak_or_malformed_secret_is_refused_and_not_shown(secret: str) -> None:
    for call in (lambda: sign(secret, ID, AT, BODY), lambda: verify(secret, HEADERS, BODY, AT)):
        with pytest.raises(InvalidMessage) as refused:
            call()
        assert refused.value.field == "secret"
        assert len(secret) < 8 or secret[6:] not in str(refused.value)
