"""Short-lived signed tokens that tell who calls.

`Callers`: the service that calls another one by gRPC, and the tenant for which it calls. `Identities`: the client of an
HTTP request. The user service makes the tokens of clients, each for one service. Another service may act for a client
only on the routes that `protos.calls` lists, and must show the token by which the user service introduced the client to
it: so a service that was taken over, or its key alone, can act only for clients that have just used it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Generic, TypeVar

from infra.errors import Forbidden, Unauthenticated
from infra.security.keys import LIFETIME_SECONDS, Keyring
from protos.calls import ROUTES

T = TypeVar("T")

_KEPT = 10_000
"""The most tokens that are kept; each has about 500 bytes. A token that is not kept is made or verified again."""


@dataclass(frozen=True)
class Caller:
    """The other side of a gRPC call."""

    service: str
    tenant_id: str
    """The tenant for which it calls; empty if it calls for the operator of the platform."""


class Callers:
    """Makes this service's tokens for gRPC calls, and verifies those of its callers."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._made = _Made()
        self._verified: _Verified[Caller] = _Verified(keyring)

    def token(self, for_: str, tenant_id: str = "") -> str:
        """A token for calls to the service `for_`, replaced after half of its minute."""
        return self._made.get((for_, tenant_id), lambda: self._keyring.sign(for_, tenant=tenant_id))

    def verify(self, token: str) -> Caller:
        """The calling service and its tenant. Raises Unauthenticated with the token's fault."""
        return self._verified.get(token, self._caller)

    def _caller(self, token: str) -> tuple[float, Caller]:
        claims = self._keyring.verify(token, self._keyring.service)
        return claims["exp"], Caller(claims["iss"], _text(claims.get("tenant", ""), "tenant"))


SCOPES = ("read", "run", "write", "admin")
"""The rights of a client. run: talk to agents; write: set things up; admin: keys and members."""
IDENTITY_HEADER = "x-claw-identity"
_ISSUER = "user"
INTRODUCED_SECONDS = 420.0
"""A service may act for a client until this time after the expiry of the client's token. A service with long
connections renews the token while it can reach the user service, and ends them if it cannot for 300 s."""


@dataclass(frozen=True)
class Identity:
    """A client of the HTTP surface."""

    actor: str
    """``api_key:<id>``, ``member:<id>`` or ``operator``."""
    tenant_id: str
    """Empty for the operator of the platform, who does not belong to a tenant."""
    scopes: frozenset[str]
    key_id: str = ""
    """The id of the API key that the client presented; empty for the operator."""
    groups: frozenset[str] = frozenset()
    """The names of the member's groups."""
    token: str = field(default="", compare=False, repr=False)
    """The token of the user service that names this client."""


class Identities:
    """Makes and verifies the tokens of clients."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._made = _Made()
        self._verified: _Verified[tuple[str, Identity]] = _Verified(keyring)

    def token(self, identity: Identity, service: str) -> str:
        """A token for requests of this client to `service`. Others accept it only from the user service."""
        return self._keyring.sign(
            f"{service}/http",
            sub=identity.actor,
            tenant=identity.tenant_id,
            key=identity.key_id,
            groups=sorted(identity.groups),
            scopes=sorted(identity.scopes),
        )

    def on_behalf(self, identity: Identity, service: str) -> str:
        """A token of this service for requests to `service` in the name of a client. It has the client's own token,
        as a proof that the client is here."""
        return self._made.get(
            (service, identity.token), lambda: self._keyring.sign(f"{service}/http", client=identity.token)
        )

    def introduced(self, token: str, service: str) -> Identity:
        """The client that the user service has introduced to `service` by this token, now or some minutes ago."""
        claims = self._keyring.verify(token, f"{service}/http", expired_seconds=INTRODUCED_SECONDS)
        if claims["iss"] != _ISSUER:
            raise Unauthenticated(f"token: the client's token is from {claims['iss']}, not from the user service")
        return _client(claims, token)

    def verify(self, token: str, method: str, path: str) -> Identity:
        """The client that the token of a request names.

        Raises Unauthenticated for a bad token, and Forbidden if a service acts for a client on a route that it may not
        use. A service that acts for a client has the scope of the route and no other.
        """
        service, identity = self._verified.get(token, self._identity)
        if service == _ISSUER:
            return identity
        if not identity.tenant_id:
            raise Forbidden(f"{service}: must not act for the operator")
        for route in ROUTES:
            if (route.caller, route.callee, route.method) == (service, self._keyring.service, method) and _pattern(
                route.path
            ).fullmatch(path):
                return replace(identity, scopes=frozenset((route.scope,)))
        raise Forbidden(f"{service}: must not act for a client at {method} {path}")

    def _identity(self, token: str) -> tuple[float, tuple[str, Identity]]:
        claims = self._keyring.verify(token, f"{self._keyring.service}/http")
        service = claims["iss"]
        if service == _ISSUER:
            return claims["exp"], (service, _client(claims, token))
        return claims["exp"], (service, self.introduced(_text(claims.get("client"), "client"), service))


def _client(claims: Mapping[str, Any], token: str) -> Identity:
    actor, tenant_id, key_id = (_text(claims.get(name), name) for name in ("sub", "tenant", "key"))
    scopes, groups = (frozenset(claims.get(name, ())) for name in ("scopes", "groups"))
    return Identity(actor, tenant_id, scopes, key_id, groups, token)


def _text(value: object, claim: str) -> str:
    if not isinstance(value, str):
        raise Unauthenticated(f"token: the claim {claim} is missing")
    return value


@lru_cache(maxsize=256)
def _pattern(template: str) -> re.Pattern[str]:
    """The paths of a route: ``{name}`` is one segment, ``{name:path}`` one or more."""
    literal = re.split(r"(\{\w+(?::path)?\})", template)
    return re.compile(
        "".join(
            re.escape(part) if n % 2 == 0 else ".+" if part.endswith(":path}") else "[^/]+"
            for n, part in enumerate(literal)
        )
    )


class _Made:
    """Tokens that this service has made, for half of their life."""

    def __init__(self) -> None:
        self._tokens: dict[object, tuple[float, str]] = {}

    def get(self, key: object, make: Callable[[], str]) -> str:
        now = time.time()
        made, token = self._tokens.get(key, (0.0, ""))
        # The lower bound replaces a token from the future after the clock was set back.
        if not 0 <= now - made < LIFETIME_SECONDS / 2:
            if len(self._tokens) >= _KEPT:
                self._tokens.clear()
            self._tokens[key] = now, (token := make())
        return token


class _Verified(Generic[T]):
    """Tokens that were verified, until they expire or the public keys change."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._version = keyring.public.version
        self._tokens: dict[str, tuple[float, T]] = {}

    def get(self, token: str, verify: Callable[[str], tuple[float, T]]) -> T:
        public = self._keyring.public
        public.look()
        # A token that the old keys verified may no longer be valid.
        if self._version != public.version or len(self._tokens) >= _KEPT:
            self._version = public.version
            self._tokens.clear()
        known = self._tokens.get(token)
        if known is None or known[0] <= time.time():
            known = self._tokens[token] = verify(token)
        return known[1]
