"""Tokens between services."""

from __future__ import annotations

import time
from collections.abc import Callable

import jwt
import pytest

from infra.errors import Unauthenticated
from infra.security.auth import LEEWAY_SECONDS, LIFETIME_SECONDS, Callers, Identities, Identity

SECRET = "an-internal-secret-of-32-characters-or-more"
agent, billing = Callers(SECRET, "agent"), Callers(SECRET, "billing")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the process that makes tokens; the verifier has the real clock."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_a_token_names_its_caller() -> None:
    assert billing.verify(agent.token("billing")) == "agent"


CLAIMS = {"iss": "agent", "aud": "billing"}
BAD_TOKENS: dict[str, tuple[Callable[[], str], str]] = {
    "for another service": (lambda: agent.token("memory"), "made for another service"),
    "another secret": (lambda: Callers("b" * 32, "agent").token("billing"), "bad signature"),
    "no token": (lambda: "no token", "Not enough segments"),
    "empty": (lambda: "", "Not enough segments"),
    "without expiry": (lambda: jwt.encode(CLAIMS, SECRET, algorithm="HS256"), '"iat" claim'),
    "unsigned": (lambda: jwt.encode(CLAIMS, "", algorithm="none"), "alg value is not allowed"),
}


@pytest.mark.parametrize(("make", "reason"), BAD_TOKENS.values(), ids=BAD_TOKENS)
def test_a_bad_token_is_refused_with_the_reason(make: Callable[[], str], reason: str) -> None:
    with pytest.raises(Unauthenticated, match=reason):
        billing.verify(make())


def test_an_old_token_is_refused(clock: list[float]) -> None:
    clock[0] -= LIFETIME_SECONDS + LEEWAY_SECONDS + 1
    with pytest.raises(Unauthenticated, match="expired"):
        billing.verify(Callers(SECRET, "agent").token("billing"))


def test_a_verified_token_is_not_verified_again_before_it_expires(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(SECRET, "billing")
    token = agent.token("billing")
    callers.verify(token)

    def expired(*_: object, **__: object) -> None:
        raise jwt.ExpiredSignatureError

    monkeypatch.setattr(jwt, "decode", expired)
    assert callers.verify(token) == "agent"
    clock[0] += LIFETIME_SECONDS + 1
    with pytest.raises(Unauthenticated, match="expired"):
        callers.verify(token)


def test_expired_tokens_do_not_accumulate(clock: list[float]) -> None:
    callers = Callers(SECRET, "billing")
    for _ in range(250):
        clock[0] += 0.001
        callers.verify(Callers(SECRET, f"agent{clock[0]}").token("billing"))
    assert len(callers._verified) <= 100


def test_a_token_is_kept_for_half_its_life_and_not_over_a_jump_of_the_clock(clock: list[float]) -> None:
    callers = Callers(SECRET, "agent")
    clock[0] = 1_000_000.0
    first = callers.token("billing")
    clock[0] += LIFETIME_SECONDS / 2 - 1
    assert callers.token("billing") == first
    clock[0] += 2
    second = callers.token("billing")
    assert second != first
    clock[0] -= 3600
    assert callers.token("billing") != second


def test_an_identity_has_its_key_and_one_of_an_older_version_has_none() -> None:
    identities = Identities(SECRET)
    who = Identity("member:m1", "t1", frozenset(("read",)), "k1", frozenset(("sales",)))
    assert identities.verify(identities.token(who)) == who
    claims = {"aud": "clawbus", "sub": "member:m1", "tenant": "t1", "scopes": ["read"], "exp": int(time.time()) + 60}
    older = identities.verify(jwt.encode(claims, SECRET, algorithm="HS256"))
    assert older == Identity("member:m1", "t1", frozenset(("read",)))
