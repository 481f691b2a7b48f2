"""A fake of api.twilio.com, and webhooks as Twilio sends them (https://www.twilio.com/docs/usage/security)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from urllib.parse import parse_qsl, urlencode

from tooling.testing.vendors.server import Call, Refused, Reply, StandIn


class TwilioStandIn(StandIn):
    """One account with one number. `stopped`: people who have unsubscribed."""

    def __init__(self) -> None:
        super().__init__()
        self.sid = f"AC{secrets.token_hex(16)}"
        self.token = secrets.token_hex(16)
        self.number = "+15550001"
        self.stopped: set[str] = set()

    @property
    def credentials(self) -> dict[str, str]:
        return {"account_sid": self.sid, "auth_token": self.token, "from_number": self.number}

    def message(
        self, url: str, text: str | None = "hi", *, person: str = "+4915550002", **fields: str
    ) -> tuple[bytes, dict[str, str]]:
        """Body and headers of a call to `url`; null ones of its fields are left out."""
        sid = f"SM{secrets.token_hex(16)}"
        given = {"MessageSid": sid, "AccountSid": self.sid, "From": person, "To": self.number, "Body": text}
        form = {name: value for name, value in (given | {"NumMedia": "0"} | fields).items() if value is not None}
        return self.signed(url, form)

    def signed(self, url: str, form: dict[str, str]) -> tuple[bytes, dict[str, str]]:
        signed = url + "".join(f"{name}{form[name]}" for name in sorted(form))
        digest = hmac.new(self.token.encode(), signed.encode(), hashlib.sha1).digest()
        return urlencode(form).encode(), {
            "content-type": "application/x-www-form-urlencoded",
            "x-twilio-signature": base64.b64encode(digest).decode(),
        }

    def status(self, sid: str, state: str, **fields: str) -> tuple[bytes, dict[str, str]]:
        """The call to the address that the message named."""
        [url] = [one.fields["StatusCallback"] for one in self.ledger if one.id == sid]
        form = {"MessageSid": sid, "MessageStatus": state, "AccountSid": self.sid, "To": "+4915550002"}
        return self.signed(url, form | {"From": self.number} | fields)

    def handle(self, call: Call) -> Reply:
        if call.path.startswith("/cdn/"):
            # The server of the contents gets no password.
            assert "authorization" not in call.headers
            return self.file(call.path.removeprefix("/cdn"))
        login = base64.b64encode(f"{self.sid}:{self.token}".encode()).decode()
        if call.headers.get("authorization") != f"Basic {login}":
            raise Refused(_error(401, 20003, "Authenticate"))
        account = f"/2010-04-01/Accounts/{self.sid}"
        if "/Media/" in call.path:
            return Reply(307, None, {"location": f"/cdn{call.path}"})
        if (call.method, call.path) == ("GET", f"{account}.json"):
            return Reply(200, {"sid": self.sid, "friendly_name": "Example", "status": "active"})
        if (call.method, call.path) == ("GET", f"{account}/IncomingPhoneNumbers.json?PhoneNumber=%2B15550001"):
            return Reply(200, {"incoming_phone_numbers": [{"sid": "PN1", "phone_number": self.number}]})
        if (call.method, call.path) == ("POST", f"{account}/IncomingPhoneNumbers/PN1.json"):
            form = dict(parse_qsl(call.body.decode(), strict_parsing=True))
            if form.get("SmsMethod") != "POST":
                raise Refused(_error(400, 21604, "SmsMethod"))
            self.webhook = form["SmsUrl"]
            return Reply(200, {"sid": "PN1"})
        if (call.method, call.path) != ("POST", f"{account}/Messages.json"):
            raise Refused(_error(404, 20404, "not found"))
        if call.headers.get("content-type") != "application/x-www-form-urlencoded":
            raise Refused(_error(400, 21604, "A 'To' phone number is required"))
        form = dict(parse_qsl(call.body.decode(), strict_parsing=True))
        if set(form) - {"StatusCallback"} != {"To", "From", "Body"}:
            raise Refused(_error(400, 21603, f"fields {sorted(form)}"))
        if form["From"] != self.number:
            raise Refused(_error(400, 21606, "not a valid number of this account"))
        if len(form["Body"]) > 1_600:
            raise Refused(_error(400, 21617, "The concatenated message body exceeds the 1600 character limit"))
        if form["To"] in self.stopped:
            raise Refused(_error(400, 21610, "Attempt to send to unsubscribed recipient"))
        sid = f"SM{secrets.token_hex(16)}"
        self.record(form["To"], form["Body"], sid, form)
        return Reply(201, {"sid": sid, "status": "queued", "body": form["Body"]})


def _error(status: int, code: int, message: str) -> Reply:
    return Reply(status, {"code": code, "message": message, "status": status})
