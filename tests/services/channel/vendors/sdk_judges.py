"""Runs in `.venv-judges`, without our code: the verdicts of the SDKs of LINE, Lark and Teams about webhook calls.

Reads a JSON list of calls from stdin and writes a list of verdicts: null for a refused call, else its events' kinds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import jwt
import lark_oapi
from lark_oapi.core.model import RawRequest
from linebot.v3 import WebhookParser
from linebot.v3.exceptions import InvalidSignatureError
from microsoft_teams.api import ActivityTypeAdapter
from microsoft_teams.apps.auth.token_validator import TokenValidator


def line(call: dict[str, Any]) -> list[str] | None:
    try:
        events = WebhookParser(call["secret"]).parse(call["body"], call["headers"]["x-line-signature"])
    except (InvalidSignatureError, ValueError):
        return None
    return [_kind(event) for event in events]


def _kind(event: Any) -> str:
    """An event that the SDK cannot read has no message."""
    return f"{event.type}/{event.message.type}" if hasattr(event, "message") else str(event.type)


def lark(call: dict[str, Any]) -> list[str] | None:
    seen: list[str] = []

    def message(event: Any) -> None:
        seen.append(f"{event.header.event_type}/{event.event.message.message_type}")

    builder = lark_oapi.EventDispatcherHandler.builder(call["encrypt_key"], call["verification_token"])
    handler = builder.register_p2_im_message_receive_v1(message).build()
    request = RawRequest()
    request.uri = "/"
    request.body = call["body"].encode()
    names = {"x-lark-request-timestamp", "x-lark-request-nonce", "x-lark-signature"}
    request.headers = {
        "-".join(part.capitalize() for part in name.split("-")): value
        for name, value in call["headers"].items()
        if name in names
    }
    answer = handler.do(request)
    return seen if answer.status_code == 200 else None


def teams(call: dict[str, Any]) -> list[str] | None:
    try:
        activity = json.loads(call["body"])
        validator = TokenValidator.for_service(call["app_id"], activity["serviceUrl"])
        # In place of the published keys of the Bot Framework.
        validator._jwks_client.fetch_data = lambda: {"keys": call["keys"]}
        asyncio.run(validator.validate_token(call["headers"]["authorization"].removeprefix("Bearer ")))
        return [ActivityTypeAdapter.validate_python(activity).type]
    except (ValueError, KeyError, jwt.PyJWTError):
        return None


if __name__ == "__main__":
    logging.disable()
    calls = json.load(sys.stdin)
    judges = {"line": line, "lark": lark, "teams": teams}
    json.dump([judges[call["vendor"]](call) for call in calls], sys.stdout)
