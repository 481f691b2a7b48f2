"""A fake of the Bot Framework: its published keys, its login, and its connector.

https://learn.microsoft.com/azure/bot-service/rest-api/bot-framework-rest-connector-authentication
"""

from __future__ import annotations

import base64
import itertools
import secrets
import time
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn, encoded

SERVICE = "https://smba.trafficmanager.net/emea/"


class _Activity(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["message"]
    text: Annotated[str, msgspec.Meta(min_length=1)]
    textFormat: Literal["markdown"]
    replyToId: str | None = None


class TeamsStandIn(StandIn):
    """One bot. `gone`: conversations that do not have the bot any more."""

    def __init__(self) -> None:
        super().__init__()
        self.app_id = f"{secrets.token_hex(4)}-0000-4000-8000-{secrets.token_hex(6)}"
        self.password = secrets.token_urlsafe(24)
        self.tokens: set[str] = set()
        """The access tokens that are valid. Cleared, they have run out."""
        self.gone: set[str] = set()
        self.reads = 0
        """How often the published keys were read."""
        self._keys: dict[str, RSAPrivateKey] = {}
        self._ids = itertools.count(1)
        self.rotate()

    @property
    def credentials(self) -> dict[str, str]:
        return {"app_id": self.app_id, "app_password": self.password}

    def rotate(self) -> None:
        """Publishes another key in the place of the present one."""
        self._keys = {secrets.token_hex(8): generate_private_key(65_537, 2_048)}

    def activity(self, text: str | None = "hi", **fields: object) -> dict[str, Any]:
        given = {
            "type": "message",
            "id": f"a{next(self._ids)}",
            "channelId": "msteams",
            "serviceUrl": SERVICE,
            "from": {"id": "29:1", "aadObjectId": "x"},
            "recipient": {"id": f"28:{self.app_id}"},
            "conversation": {"id": "19:c@thread.tacv2;messageid=1", "tenantId": "t1"},
            "text": text,
        }
        return {name: value for name, value in (given | fields).items() if value is not None}

    def signed(self, activity: Any, **claims: object) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call; `claims` replace those of its token, null ones are left out."""
        now = int(time.time())
        service = activity.get("serviceUrl") if isinstance(activity, dict) else SERVICE
        given = {
            "iss": "https://api.botframework.com",
            "aud": self.app_id,
            "serviceurl": service,
            "nbf": now,
            "exp": now + 3_600,
        }
        payload = {name: value for name, value in (given | claims).items() if value is not None}
        [(key_id, key)] = self._keys.items()
        token = jwt.encode(payload, key, algorithm="RS256", headers={"kid": key_id})
        body = activity if isinstance(activity, bytes) else encoded(activity)
        return body, {"content-type": "application/json", "authorization": f"Bearer {token}"}

    def handle(self, call: Call) -> Reply:
        if call.path == "/v1/.well-known/openidconfiguration":
            return Reply(200, {"issuer": "https://api.botframework.com", "jwks_uri": "https://login.example/v1/keys"})
        if call.path == "/v1/keys":
            self.reads += 1
            return Reply(200, {"keys": [_public(key_id, key) for key_id, key in self._keys.items()]})
        if call.path == "/botframework.com/oauth2/v2.0/token":
            form = dict(parse_qsl(call.body.decode()))
            if (form.get("client_id"), form.get("client_secret")) != (self.app_id, self.password):
                raise Refused(Reply(400, {"error": "invalid_client"}))
            token = secrets.token_urlsafe(32)
            self.tokens.add(token)
            return Reply(200, {"access_token": token, "expires_in": 3600, "token_type": "Bearer"})
        if call.path in self.files:
            if call.path.startswith("/token/") and call.headers.get("authorization", "")[7:] not in self.tokens:
                raise Refused(Reply(401, {"error": {"code": "Unauthorized", "message": "no"}}))
            return self.file(call.path)
        match [unquote(part) for part in call.path.split("/")]:
            case ["", "emea", "v3", "conversations", conversation, "activities", *quoted] if len(quoted) < 2:
                return self._activity(conversation, quoted, call)
        raise Refused(Reply(404, {"error": {"code": "NotFound", "message": call.path}}))

    def _activity(self, conversation: str, quoted: list[str], call: Call) -> Reply:
        if call.headers.get("authorization", "").removeprefix("Bearer ") not in self.tokens:
            raise Refused(Reply(401, {"error": {"code": "Unauthorized", "message": "no"}}))
        if call.method == "DELETE":
            if not self.withdraw(quoted[0]):
                raise Refused(Reply(404, {"error": {"code": "ActivityNotFoundInConversation", "message": "no"}}))
            return Reply(200, None)
        if msgspec.json.decode(call.body) == {"type": "typing"}:
            self.signs.append(conversation)
            return Reply(201, {"id": f"s{next(self._ids)}"})
        try:
            activity = msgspec.json.decode(call.body, type=_Activity)
        except msgspec.DecodeError as error:
            raise Refused(Reply(400, {"error": {"code": "BadSyntax", "message": str(error)}})) from error
        if call.method == "PUT":
            if not self.change(quoted[0], activity.text):
                raise Refused(Reply(404, {"error": {"code": "ActivityNotFoundInConversation", "message": "no"}}))
            return Reply(200, {"id": quoted[0]})
        if activity.replyToId != (quoted[0] if quoted else None):
            raise Refused(Reply(400, {"error": {"code": "BadArgument", "message": "replyToId"}}))
        if conversation in self.gone:
            problem = {
                "code": "BotNotInConversationRoster",
                "message": "The bot is not part of the conversation roster.",
            }
            raise Refused(Reply(403, {"error": problem}))
        id_ = f"s{next(self._ids)}"
        self.record(conversation, activity.text, id_, msgspec.to_builtins(activity))
        return Reply(201, {"id": id_})


def published(fake: TeamsStandIn) -> dict[str, dict[str, object]]:
    """The published keys by their id."""
    return {key_id: _public(key_id, key) for key_id, key in fake._keys.items()}


def _public(key_id: str, key: RSAPrivateKey) -> dict[str, object]:
    numbers = key.public_key().public_numbers()

    def encoded(number: int) -> str:
        return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8)).rstrip(b"=").decode()

    return {
        "kty": "RSA",
        "use": "sig",
        "kid": key_id,
        "n": encoded(numbers.n),
        "e": encoded(numbers.e),
        "endorsements": ["msteams", "webchat"],
    }
