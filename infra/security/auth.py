"""Short-lived signed tokens (JWT, HS256, RFC 7519) that tell who calls.

`Callers`: the service that calls another one by gRPC. `Identities`: the client for which the gateway forwards a
request; the user service makes these tokens, and every service verifies them by itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jwt

from infra.errors import Unauthenticated

LIFETIME_SECONDS = 60
LEEWAY_SECONDS = 5
"""The largest difference between the clocks of two machines."""


class Callers:
    """Makes this service's tokens and verifies those of others. `secret` is the same in all services."""

    def __init__(self, secret: str, service: str) -> None:
        self._secret = secret
        self._service = service
        self._tokens: dict[str, tuple[float, str]] = {}
        self._verified: dict[str, tuple[float, str]] = {}

    def token(self, for_: str) -> str:
        """A token for calls to the service `for_`, replaced after half of its minute."""
        now = time.time()
        made, token = self._tokens.get(for_, (0.0, ""))
        # The lower bound replaces a token from the future after the clock was set back.
        if not 0 <= now - made < LIFETIME_SECONDS / 2:
            claims = {"iss": self._service, "aud": for_, "iat": int(now), "exp": int(now) + LIFETIME_SECONDS}
            token = jwt.encode(claims, self._secret, algorithm="HS256")
            self._tokens[for_] = (now, token)
        return token

    def verify(self, token: str) -> str:
        """The name of the calling service. Raises Unauthenticated with the token's fault."""
        now = time.time()
        expires, caller = self._verified.get(token, (0.0, ""))
        if expires > now:
            return caller
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                audience=self._service,
                leeway=LEEWAY_SECONDS,
                options={"require": ["iss", "aud", "iat", "exp"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("caller token: expired; check that the clocks of both machines agree") from error
        except jwt.InvalidAudienceError as error:
            raise Unauthenticated(f"caller token: made for another service than {self._service}") from error
        except jwt.InvalidSignatureError as error:
            reason = "caller token: bad signature; CLAW_INTERNAL_SECRET must be the same in both services"
            raise Unauthenticated(reason) from error
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"caller token: {error}") from error
        if len(self._verified) >= 100:
            # A caller makes two tokens a minute; expired ones must not accumulate.
            self._verified.clear()
        self._verified[token] = float(claims["exp"]), str(claims["iss"])
        return str(claims["iss"])


SCOPES = ("read", "run", "write", "admin")
"""The rights of a client. run: talk to agents; write: set things up; admin: keys and members."""
IDENTITY_HEADER = "x-claw-identity"
_CLIENTS = "clawbus"


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


class Identities:
    """Makes and verifies identity tokens. `secret` is the same in all services."""

    def __init__(self, secret: str) -> None:
        self._secret = secret
        self._verified: dict[str, tuple[float, Identity]] = {}

    def token(self, identity: Identity) -> str:
        now = int(time.time())
        claims = {
            "aud": _CLIENTS,
            "sub": identity.actor,
            "tenant": identity.tenant_id,
            "scopes": sorted(identity.scopes),
            "key": identity.key_id,
            "groups": sorted(identity.groups),
            "iat": now,
            "exp": now + LIFETIME_SECONDS,
        }
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def verify(self, token: str) -> Identity:
        """The client that the token names. Raises Unauthenticated for a bad signature or an expired token."""
        expires, identity = self._verified.get(token, (0.0, None))
        if identity and expires > time.time():
            return identity
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                audience=_CLIENTS,
                leeway=LEEWAY_SECONDS,
                options={"require": ["sub", "aud", "exp"]},
            )
        except jwt.InvalidTokenError as error:
            raise Unauthenticated(f"identity: {error}") from error
        identity = Identity(
            claims["sub"],
            claims["tenant"],
            frozenset(claims["scopes"]),
            claims.get("key", ""),
            frozenset(claims.get("groups", ())),
        )
        if len(self._verified) >= 1000:
            self._verified.clear()
        self._verified[token] = float(claims["exp"]), identity
        return identity
