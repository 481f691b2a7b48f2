"""Key pairs of the services: who may sign for whom, for how long, and what happens when a file changes."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.errors import Transient, Unauthenticated
from infra.security import watched
from infra.security.keys import LIFETIME_SECONDS, Keyring, key_id, read_private, read_public
from tooling.stack import keys as stack_keys

SERVICES = ("agent", "billing", "user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stack_keys.make_keys(tmp_path, SERVICES)
    return tmp_path


def keyring(folder: Path, service: str) -> Keyring:
    return Keyring(service, stack_keys.private_file(folder, service), stack_keys.public_file(folder))


def token(folder: Path, service: str = "agent", *, kid: str | None = None, **claims: object) -> str:
    """A token of `service` with these claims."""
    key = read_private(stack_keys.private_file(folder, service))
    now = int(time.time())
    content = {"iss": service, "aud": "billing", "iat": now, "exp": now + 30, **claims}
    headers = {"kid": key_id(service, key.public_key()) if kid is None else kid}
    return jwt.encode({k: v for k, v in content.items() if v is not None}, key, algorithm="EdDSA", headers=headers)


def test_a_token_names_its_caller_and_lasts_a_minute(folder: Path) -> None:
    claims = keyring(folder, "billing").verify(keyring(folder, "agent").sign("billing", tenant="t1"), "billing")
    assert (claims["iss"], claims["tenant"]) == ("agent", "t1")
    assert claims["exp"] - claims["iat"] == LIFETIME_SECONDS


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "longer than a minute": (lambda f: token(f, exp=int(time.time()) + 3600), "valid for more than 60 s"),
    "ten years": (lambda f: token(f, exp=int(time.time()) + 10 * 365 * 86400), "valid for more than 60 s"),
    "without a beginning": (lambda f: token(f, iat=None), '"iat" claim'),
    "without an end": (lambda f: token(f, exp=None), '"exp" claim'),
    "without an audience": (lambda f: token(f, aud=None), '"aud" claim'),
    "in another's name": (lambda f: token(f, iss="user"), "agent has signed it in the name of another"),
    "for another": (lambda f: token(f, aud="user"), "not made for billing"),
    "with another's key id": (
        lambda f: token(f, iss="user", kid=next(kid for kid in _public(f) if kid.startswith("user."))),
        "Signature verification failed",
    ),
    "with an unknown key": (lambda f: token(f, kid="agent.0"), "is not in keys.json"),
    "without a key id": (lambda f: token(f, kid=""), "is not in keys.json"),
    "unsigned": (
        lambda f: jwt.encode({"iss": "agent"}, "", algorithm="none", headers={"kid": next(iter(_public(f)))}),
        "alg",
    ),
    "signed with a public key as a secret": (lambda f: _hs256(f), "alg"),
    "no token": (lambda _: "no token", "Not enough segments"),
    "empty": (lambda _: "", "Not enough segments"),
}


def test_a_good_token_that_has_expired_is_no_fault_of_the_client(folder: Path) -> None:
    """Under load a request may wait longer than its token lives. 401 would say that the API key is wrong."""
    late = token(folder, iat=int(time.time()) - 100, exp=int(time.time()) - 50)
    with pytest.raises(Transient, match="expired"):
        keyring(folder, "billing").verify(late, "billing")
    with pytest.raises(Unauthenticated, match="Signature"):
        keyring(folder, "billing").verify(late[:-4] + "AAAA", "billing")


def test_a_good_token_from_the_future_is_a_fault_of_a_clock(folder: Path) -> None:
    early = token(folder, iat=int(time.time()) + 100, exp=int(time.time()) + 130)
    with pytest.raises(Transient, match="not yet valid"):
        keyring(folder, "billing").verify(early, "billing")
    with pytest.raises(Unauthenticated, match="Signature"):
        keyring(folder, "billing").verify(early[:-4] + "AAAA", "billing")


def _public(folder: Path) -> list[str]:
    return list(read_public(stack_keys.public_file(folder)))


def _hs256(folder: Path) -> str:
    kid, key = next(iter(read_public(stack_keys.public_file(folder)).items()))
    now = int(time.time())
    claims = {"iss": "agent", "aud": "billing", "iat": now, "exp": now + 30}
    return jwt.encode(claims, key.public_bytes_raw(), algorithm="HS256", headers={"kid": kid})


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_a_bad_token_is_refused_with_the_reason(folder: Path, make: Callable[[Path], str], reason: str) -> None:
    with pytest.raises(Unauthenticated, match=reason):
        keyring(folder, "billing").verify(make(folder), "billing")


def test_set_up_makes_files_that_only_their_owner_can_read_and_keeps_them(folder: Path) -> None:
    private = [stack_keys.private_file(folder, service) for service in SERVICES]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in private} == {0o700}
    assert len({path.read_bytes() for path in private}) == len(SERVICES)
    public = stack_keys.public_file(folder)
    content = json.loads(public.read_text())
    assert {kid.partition(".")[0] for kid in read_public(public)} == set(SERVICES)
    assert all("d" not in key for key in content["keys"])
    before = [path.read_bytes() for path in (*private, public)]
    stack_keys.make_keys(folder, SERVICES)
    assert [path.read_bytes() for path in (*private, public)] == before


def test_a_private_key_that_others_can_read_is_refused(folder: Path) -> None:
    path = stack_keys.private_file(folder, "agent")
    path.chmod(0o644)
    with pytest.raises(ValueError, match="other users can read this private key"):
        read_private(path)


def _jwk(**members: str) -> str:
    key = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    x = base64.urlsafe_b64encode(key.public_bytes_raw()).rstrip(b"=").decode()
    return json.dumps({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x, "kid": key_id("agent", key), **members}]})


@pytest.mark.parametrize(
    "content", ["", "[]", '{"keys": 1}', '{"keys": [{}]}', _jwk(x="AAAA"), _jwk(kty="oct"), _jwk(kid="user.1")]
)
def test_a_damaged_file_of_public_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(_jwk())
    assert [kid.partition(".")[0] for kid in read_public(path)] == ["agent"]
    path.write_text(content)
    with pytest.raises(ValueError, match=r"keys\.json"):
        read_public(path)


def test_a_damaged_private_key_is_refused_and_not_shown(folder: Path) -> None:
    path = stack_keys.private_file(folder, "agent")
    path.write_text(path.read_text()[:-40] + "hunter2")
    with pytest.raises(ValueError, match="must be an Ed25519 private key") as caught:
        read_private(path)
    assert "hunter2" not in str(caught.value)


def test_a_rotation_refuses_no_token_and_ends_the_old_keys(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)
    agent, billing = keyring(folder, "agent"), keyring(folder, "billing")
    old = agent.sign("billing")
    stack_keys.add(folder, SERVICES)
    assert len(_public(folder)) == 2 * len(SERVICES)
    assert billing.verify(old, "billing")
    # Interrupted here: the next rotation goes on with the same keys.
    stack_keys.add(folder, SERVICES)
    assert len(_public(folder)) == 2 * len(SERVICES)
    stack_keys.switch(folder, SERVICES)
    new = agent.sign("billing")
    assert jwt.get_unverified_header(new)["kid"] != jwt.get_unverified_header(old)["kid"]
    assert billing.verify(old, "billing")
    assert billing.verify(new, "billing")
    assert stack_keys.forget(folder, SERVICES) == len(SERVICES)
    assert billing.verify(new, "billing")
    with pytest.raises(Unauthenticated, match="is not in keys"):
        billing.verify(old, "billing")


def test_a_new_key_is_known_at_once(folder: Path) -> None:
    # Within the second in which the file is not looked at, too.
    billing = keyring(folder, "billing")
    stack_keys.add(folder, SERVICES)
    stack_keys.switch(folder, SERVICES)
    assert billing.verify(keyring(folder, "agent").sign("billing"), "billing")


def test_a_damaged_file_leaves_the_old_keys_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LOOK_SECONDS", 0.0)
    agent, billing = keyring(folder, "agent"), keyring(folder, "billing")
    stack_keys.public_file(folder).write_text("{")
    stack_keys.private_file(folder, "agent").unlink()
    assert billing.verify(agent.sign("billing"), "billing")
