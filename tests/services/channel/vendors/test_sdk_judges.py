"""The SDKs of LINE, Lark and Teams accept the calls of our stand-ins, read the same kinds, and refuse the same calls.

They need older packages than the project. ``python -m tests.services.channel.vendors.test_sdk_judges`` installs them.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra.clock import utcnow
from infra.errors import InvalidMessage, Unauthenticated
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Request
from tests.services.channel.vendors import kinds_of_apps, kinds_of_messengers, kinds_of_offices
from tests.services.channel.vendors.conftest import keys_of
from tooling.stack.own_environment import environment, python_with_pins
from tooling.testing.vendors import FeishuStandIn, LineStandIn, TeamsStandIn
from tooling.testing.vendors.teams import published

PYTHON = python_with_pins("judges")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="the SDKs are not installed: see the docstring")


def judged(calls: list[dict[str, Any]]) -> list[list[str] | None]:
    assert PYTHON
    program = Path(__file__).parent / "sdk_judges.py"
    done = subprocess.run(
        [PYTHON, program], input=json.dumps(calls), capture_output=True, text=True, check=True, timeout=120
    )
    verdicts: list[list[str] | None] = json.loads(done.stdout)
    return verdicts


def changed(body: bytes, headers: dict[str, str], proofs: tuple[str, ...]) -> list[tuple[bytes, dict[str, str]]]:
    """The call with one byte changed, at every tenth place, and with each proof changed."""
    forged = [(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :], headers) for at in range(0, len(body), 10)]
    return forged + [(body, headers | {name: f"0{headers[name][1:]}x"}) for name in proofs]


def ours(name: str, fake: Any, body: bytes, headers: dict[str, str]) -> bool:
    vendor = VENDORS[name]
    keys = keys_of(fake) if isinstance(fake, TeamsStandIn) else {}
    try:
        vendor.receive(Request("POST", "", headers, body, keys=keys), vendor.credentials(**fake.credentials), utcnow())
    except (Unauthenticated, InvalidMessage):
        return False
    return True


def test_lines_sdk_reads_the_same_kinds_and_refuses_the_same_calls() -> None:
    fake, request, given = kinds_of_messengers.line()
    assert isinstance(fake, LineStandIn)
    calls, expected = [], []
    for kind, (content, _) in given.items():
        made_ = request(content)
        calls.append((made_.body, dict(made_.headers)))
        expected.append(kind.removeprefix("event.") if "." in kind and kind != "event.message" else f"message/{kind}")
    expected[expected.index("message/event.message")] = "message/text"
    body, headers = fake.call(fake.event("größer 😀"))
    forged = changed(body, headers, ("x-line-signature",))
    shown = [
        {"vendor": "line", "secret": fake.secret, "body": one.decode("utf-8", "replace"), "headers": signed}
        for one, signed in (*calls, (body, headers), *forged)
    ]
    verdicts = judged(shown)
    read = [verdict and verdict[0] for verdict in verdicts[: len(calls)]]
    assert [(one, wanted) for one, wanted in zip(read, expected, strict=True) if one != wanted] == []
    assert verdicts[len(calls)] == ["message/text"]
    assert ours("line", fake, body, headers)
    assert verdicts[len(calls) + 1 :] == [None] * len(forged)
    assert not any(ours("line", fake, *one) for one in forged)


def test_larks_sdk_reads_the_same_kinds_and_refuses_the_same_calls() -> None:
    fake, request, given = kinds_of_offices.feishu()
    assert isinstance(fake, FeishuStandIn)
    kinds = [kind for kind in given if "." not in kind]
    calls = [(made_.body, dict(made_.headers)) for kind in kinds for made_ in [request(given[kind][0])]]
    body, headers = fake.call(fake.event("größer 😀"))
    proofs = ("x-lark-signature", "x-lark-request-timestamp", "x-lark-request-nonce")
    forged = changed(body, headers, proofs)
    shown = [
        {
            "vendor": "lark",
            "encrypt_key": fake.encrypt_key,
            "verification_token": fake.verification_token,
            "body": one.decode("utf-8", "replace"),
            "headers": signed,
        }
        for one, signed in (*calls, (body, headers), *forged)
    ]
    verdicts = judged(shown)
    assert verdicts[: len(calls)] == [[f"im.message.receive_v1/{kind}"] for kind in kinds]
    assert verdicts[len(calls)] == ["im.message.receive_v1/text"]
    assert ours("feishu", fake, body, headers)
    assert verdicts[len(calls) + 1 :] == [None] * len(forged)
    assert not any(ours("feishu", fake, *one) for one in forged)


def test_the_sdk_of_teams_reads_the_same_kinds_and_refuses_the_same_tokens() -> None:
    fake, request, given = kinds_of_apps.teams()
    assert isinstance(fake, TeamsStandIn)
    kinds = ("message", "messageUpdate", "messageDelete", "messageReaction", "typing", "invoke.adaptiveCard/action")
    calls = [(made_.body, dict(made_.headers)) for kind in kinds for made_ in [request(given[kind][0])]]
    activity = fake.activity("größer 😀")
    past: dict[str, object] = {"iat": 1_700_000_000, "nbf": 1_700_000_000, "exp": 1_700_003_600}
    wrong: list[dict[str, object]] = [
        {"aud": "another"},
        {"iss": "https://sts.windows.net/x/"},
        {"serviceurl": "https://other.example/"},
        past,
        {"nbf": 4_000_000_000, "exp": 4_000_003_600},
    ]
    forged = [fake.signed(activity, **claims) for claims in wrong]
    body, headers = fake.signed(activity)
    head, payload, signature = headers["authorization"].removeprefix("Bearer ").split(".")
    forged += [(body, {"authorization": f"Bearer {token}"}) for token in ("", "x", f"{head}.{payload}.")]
    forged += [
        (
            body,
            {
                "authorization": f"Bearer {head}.{payload}.{signature[:at]}{'A' if signature[at] != 'A' else 'B'}"
                f"{signature[at + 1 :]}"
            },
        )
        for at in range(0, len(signature) - 1, 40)
    ]
    other = TeamsStandIn()
    forged.append(other.signed(activity, aud=fake.app_id))
    keys = list(published(fake).values())
    shown = [
        {"vendor": "teams", "app_id": fake.app_id, "keys": keys, "body": one.decode(), "headers": signed}
        for one, signed in (*calls, (body, headers), *forged)
    ]
    verdicts = judged(shown)
    assert verdicts[: len(calls) + 1] == [[kind.partition(".")[0]] for kind in (*kinds, "message")]
    assert all(ours("teams", fake, *one) for one in (*calls, (body, headers)))
    assert verdicts[len(calls) + 1 :] == [None] * len(forged)
    assert [ours("teams", fake, *one) for one in forged] == [False] * len(forged)


if __name__ == "__main__":
    asyncio.run(environment("judges"))
