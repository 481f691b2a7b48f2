"""Tokens of services and clients."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from infra.errors import Forbidden, Transient, Unauthenticated
from infra.security import auth
from infra.security.auth import INTRODUCED_SECONDS, Caller, Callers, Identities, Identity
from infra.security.keys import LEEWAY_SECONDS, LIFETIME_SECONDS, Keyring
from tooling.testing import keys

WHO = Identity("member:m1", "t1", frozenset(("read", "write")), "k1", frozenset(("sales",)))


def introduced(who: Identity, service: str) -> Identity:
    """The client as `service` gets it from the user service."""
    return replace(who, token=keys.identities("user").token(who, service))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of the process that makes tokens; the library that verifies them has the real clock."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_a_token_names_the_caller_and_its_tenant() -> None:
    agent, billing = keys.callers("agent"), keys.callers("billing")
    assert billing.verify(agent.token("billing")) == Caller("agent", "")
    assert billing.verify(agent.token("billing", "t1")) == Caller("agent", "t1")
    assert agent.token("billing", "t1") == agent.token("billing", "t1") != agent.token("billing", "t2")
    with pytest.raises(Unauthenticated, match="not made for memory"):
        keys.callers("memory").verify(agent.token("billing"))


def test_an_old_token_is_refused(clock: list[float]) -> None:
    clock[0] -= LIFETIME_SECONDS + LEEWAY_SECONDS + 1
    with pytest.raises(Transient, match="expired"):
        keys.callers("billing").verify(keys.callers("agent").token("billing"))


def test_a_verified_token_is_not_verified_again_before_it_expires_or_keys_change(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    keyring = keys.keyring("billing")
    callers = Callers(keyring)
    token = keys.callers("agent").token("billing")
    callers.verify(token)

    def refused(*_: object) -> None:
        raise Unauthenticated("asked again")

    monkeypatch.setattr(Keyring, "verify", refused)
    assert callers.verify(token) == Caller("agent", "")
    keyring.public.version += 1
    with pytest.raises(Unauthenticated, match="asked again"):
        callers.verify(token)
    monkeypatch.undo()
    callers.verify(token)
    clock_ = time.time()
    monkeypatch.setattr(Keyring, "verify", refused)
    monkeypatch.setattr(time, "time", lambda: clock_ + LIFETIME_SECONDS + 1)
    with pytest.raises(Unauthenticated, match="asked again"):
        callers.verify(token)


def test_tokens_do_not_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_KEPT", 10)
    agent, billing = keys.callers("agent"), keys.callers("billing")
    for n in range(25):
        billing.verify(agent.token("billing", f"t{n}"))
    assert len(billing._verified._tokens) <= 10
    assert len(agent._made._tokens) <= 10


def test_a_token_is_kept_for_half_its_life_and_not_over_a_jump_of_the_clock(clock: list[float]) -> None:
    callers = keys.callers("agent")
    clock[0] = 1_000_000.0
    first = callers.token("billing")
    clock[0] += LIFETIME_SECONDS / 2 - 1
    assert callers.token("billing") == first
    clock[0] += 2
    second = callers.token("billing")
    assert second != first
    clock[0] -= 3600
    assert callers.token("billing") != second


def test_only_the_user_service_tells_who_a_client_is() -> None:
    agent = keys.identities("agent")
    assert agent.verify(keys.identities("user").token(WHO, "agent"), "GET", "/api/v1/agents") == WHO
    operator = Identity("operator", "", frozenset(("admin",)))
    assert agent.verify(keys.identities("user").token(operator, "agent"), "GET", "/") == operator
    for service in ("channel", "ws_gateway", "notification", "agent"):
        own = keys.identities(service)
        with pytest.raises(Unauthenticated, match="the claim client is missing"):
            agent.verify(own.token(WHO, "agent"), "GET", "/api/v1/agents")
        with pytest.raises(Forbidden, match=f"{service}: must not act for a client at GET /api/v1/api-keys"):
            agent.verify(own.on_behalf(introduced(WHO, service), "agent"), "GET", "/api/v1/api-keys")
        with pytest.raises(Forbidden, match=f"{service}: must not act for the operator"):
            agent.verify(own.on_behalf(introduced(operator, service), "agent"), "GET", "/api/v1/agents")


def test_a_service_acts_only_for_a_client_that_the_user_service_has_just_introduced_to_it(clock: list[float]) -> None:
    agent, gateway = keys.identities("agent"), keys.identities("ws_gateway")
    run = "GET", "/api/v1/runs/r1"

    def acting(token: str) -> Identity:
        return agent.verify(gateway.on_behalf(replace(WHO, token=token), "agent"), *run)

    assert acting(introduced(WHO, "ws_gateway").token).tenant_id == "t1"
    for token, fault in (
        ("", "Not enough segments"),
        (introduced(WHO, "channel").token, "not made for ws_gateway/http"),
        (gateway.token(WHO, "ws_gateway"), "is from ws_gateway, not from the user service"),
    ):
        with pytest.raises(Unauthenticated, match=fault):
            acting(token)
    # Claims of the service itself about the client have no effect.
    other = replace(introduced(WHO, "ws_gateway"), tenant_id="t2", actor="member:m2")
    assert agent.verify(gateway.on_behalf(other, "agent"), *run).tenant_id == "t1"
    now = clock[0]
    for age, good in ((INTRODUCED_SECONDS, True), (INTRODUCED_SECONDS + LEEWAY_SECONDS + 2, False)):
        clock[0] = now - LIFETIME_SECONDS - age
        token = introduced(WHO, "ws_gateway").token
        clock[0] = now
        if good:
            acting(token)
        else:
            with pytest.raises(Unauthenticated, match="expired"):
                acting(token)


def test_an_identity_is_for_one_service() -> None:
    token = keys.identities("user").token(WHO, "notification")
    keys.identities("notification").verify(token, "GET", "/")
    with pytest.raises(Unauthenticated, match="not made for user/http"):
        keys.identities("user").verify(token, "POST", "/api/v1/api-keys")


def test_a_service_acts_for_a_client_on_its_routes_only_and_with_their_scope_only() -> None:
    agent, gateway = keys.identities("agent"), keys.identities("ws_gateway")
    token = gateway.on_behalf(introduced(WHO, "ws_gateway"), "agent")
    found = agent.verify(token, "POST", "/api/v1/runs/r1/cancel")
    assert found == replace(WHO, scopes=frozenset(("run",)))
    assert agent.verify(token, "POST", "/api/v1/agents/a1/sessions/x/y z/messages").scopes == {"run"}
    for method, path in (
        ("GET", "/api/v1/runs/r1/cancel"),
        ("POST", "/api/v1/runs/r1/approval"),
        ("POST", "/api/v1/runs/r1/x/cancel"),
        ("POST", "/api/v1/runs//cancel"),
        ("DELETE", "/api/v1/agents/a1"),
    ):
        with pytest.raises(Forbidden, match="must not act for a client"):
            agent.verify(token, method, path)
    with pytest.raises(Forbidden, match="channel: must not act"):
        agent.verify(
            keys.identities("channel").on_behalf(introduced(WHO, "channel"), "agent"), "POST", "/api/v1/runs/r1/cancel"
        )


def test_a_token_for_calls_is_not_one_for_http_and_the_other_way_round() -> None:
    gateway = keys.keyring("ws_gateway")
    with pytest.raises(Unauthenticated, match="not made for agent/http"):
        keys.identities("agent").verify(Callers(gateway).token("agent", "t1"), "POST", "/api/v1/runs/r1/cancel")
    with pytest.raises(Unauthenticated, match="not made for agent"):
        keys.callers("agent").verify(Identities(gateway).on_behalf(WHO, "agent"))


@pytest.mark.parametrize("claim", ["sub", "tenant", "key"])
def test_a_client_without_a_name_or_tenant_is_refused(claim: str) -> None:
    claims = {"sub": "member:m1", "tenant": "t1", "key": "k1", "scopes": ["read"]}
    token = keys.keyring("user").sign("agent/http", **{name: claims[name] for name in claims if name != claim})
    with pytest.raises(Unauthenticated, match=f"the claim {claim} is missing"):
        keys.identities("agent").verify(token, "GET", "/")
