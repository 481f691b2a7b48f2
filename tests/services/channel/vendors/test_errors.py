"""The errors that the vendors document, and the end of a message that meets them.

Beside those in the test of each vendor: the sources are the vendors' tables of errors, which the adapters name.
"""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered
from infra.outgoing.client import Outgoing
from services.channel.vendors.base import AccountRefused
from tests.services.channel.vendors.conftest import Adapter
from tests.services.channel.vendors.examples import examples
from tooling.testing.vendors.server import answer

# A place that the fake knows.
PLACES = {"qq": "users/u1", "dingtalk": "user/s1", "feishu": "oc_1", "line": "U1"}


def telegram(code: int, description: str, **parameters: Any) -> tuple[int, Any]:
    return code, {"ok": False, "error_code": code, "description": description, "parameters": parameters}


def slack(error: str) -> tuple[int, Any]:
    return 200, {"ok": False, "error": error}


def coded(status: int, code: int | str, **more: Any) -> tuple[int, Any]:
    return status, {"code": code, "message": "m", **more}


def meta(status: int, code: int) -> tuple[int, Any]:
    return status, {"error": {"code": code, "message": "m", "type": "OAuthException"}}


ERRORS: dict[str, dict[type[Exception], list[tuple[int, Any]]]] = {
    "telegram": {
        # One person, or one chat.
        EffectFailed: [
            telegram(403, "Forbidden: bot was blocked by the user"),
            telegram(403, "Forbidden: user is deactivated"),
            telegram(403, "Forbidden: bot was kicked from the supergroup chat"),
            telegram(403, "Forbidden: bot can't initiate conversation with a user"),
            telegram(400, "Bad Request: not enough rights to send text messages to the chat"),
            telegram(400, "Bad Request: have no rights to send a message"),
            telegram(400, "Bad Request: PEER_ID_INVALID"),
            telegram(400, "Bad Request: message is too long"),
            telegram(413, "Request Entity Too Large"),
        ],
        AccountRefused: [telegram(401, "Unauthorized"), telegram(404, "Not Found")],
        RetryLater: [telegram(429, "Too Many Requests: retry after 35", retry_after=35)],
        Transient: [telegram(500, "Internal Server Error"), telegram(502, "Bad Gateway")],
    },
    "slack": {
        EffectFailed: [
            slack(error)
            for error in (
                "channel_not_found",
                "not_in_channel",
                "is_archived",
                "msg_too_long",
                "no_text",
                "restricted_action",
                "restricted_action_read_only_channel",
                "messages_tab_disabled",
                "cannot_reply_to_message",
                # The bot is not a member of this conversation.
                "no_permission",
            )
        ],
        AccountRefused: [
            slack(error)
            for error in (
                "not_authed",
                "invalid_auth",
                "account_inactive",
                "token_revoked",
                "token_expired",
                "missing_scope",
                "org_login_required",
                "ekm_access_denied",
                "enterprise_is_restricted",
                "team_access_not_granted",
                "two_factor_setup_required",
                "accesslimited",
                "not_allowed_token_type",
            )
        ],
        RetryLater: [slack("ratelimited"), slack("rate_limited"), slack("message_limit_exceeded"), (429, "")],
        Transient: [slack(error) for error in ("service_unavailable", "request_timeout", "team_added_to_org")],
        # "It's possible some aspect of the operation succeeded."
        Unanswered: [slack("internal_error"), slack("fatal_error")],
    },
    "discord": {
        EffectFailed: [
            coded(403, 50001),
            coded(403, 50007),
            coded(403, 50013),
            coded(404, 10003),
            coded(400, 50006),
            coded(400, 50035),
            coded(400, 200000),
        ],
        AccountRefused: [coded(401, 0), coded(403, 40001), coded(403, 40002)],
        RetryLater: [coded(429, 0, retry_after=2.5), coded(400, 20028), coded(400, 40062)],
        Transient: [coded(503, 130000), coded(400, 40006), (500, "")],
    },
    "whatsapp": {
        # Among them: the person has not agreed, has no account, or the window of 24 hours is over.
        EffectFailed: [
            meta(400, code)
            for code in (
                100,
                130472,
                131008,
                131009,
                131021,
                131026,
                131030,
                131047,
                131049,
                131050,
                131051,
                131052,
                131053,
                132000,
                132001,
                132015,
                135000,
            )
        ],
        AccountRefused: [
            meta(401, 0),
            meta(401, 190),
            *(meta(403, code) for code in (3, 10, 33, 200, 299, 368, 131005, 131031, 131037, 131042, 131045, 133010)),
        ],
        RetryLater: [meta(400, code) for code in (4, 80007, 130429, 131048, 131056)],
        Transient: [meta(500, code) for code in (1, 2, 131000, 131016, 131057, 133004)],
    },
    "line": {
        EffectFailed: [
            (400, {"message": "The property, 'to', in the request body is invalid"}),
            (404, {"message": "Not found"}),
            (413, {"message": "Payload too large"}),
            (429, {"message": "You have reached your monthly limit."}),
        ],
        AccountRefused: [(401, {"message": "Authentication failed"}), (403, {"message": "Not authorized"})],
        RetryLater: [(429, {"message": "The API rate limit has been exceeded. Try again later."})],
        Transient: [(500, {"message": "Internal server error"})],
    },
    "twilio": {
        EffectFailed: [coded(400, code) for code in (21211, 21408, 21610, 21612, 21614, 21617, 30007)],
        AccountRefused: [
            coded(400, code)
            for code in (10001, 20003, 20005, 20006, 21212, 21606, 21659, 21661, 21701, 21703, 21704, 63007, 90010)
        ],
        RetryLater: [coded(429, 20429), *(coded(400, code) for code in (21611, 14107, 63018))],
        Transient: [coded(500, 20500), coded(503, 20503)],
    },
    "feishu": {
        EffectFailed: [
            (400, {"code": code, "msg": "m"})
            for code in (230001, 230002, 230011, 230013, 230018, 230025, 230035, 232009)
        ],
        AccountRefused: [(400, {"code": code, "msg": "m"}) for code in (230006, 99991672, 99991662, 99991401)],
        RetryLater: [(400, {"code": code, "msg": "m"}) for code in (230020, 99991400, 11232)],
        Transient: [(400, {"code": code, "msg": "m"}) for code in (230049, 2200)],
    },
    "dingtalk": {
        EffectFailed: [coded(400, "staffId.notExisted"), coded(400, "invalidParameter.robotCode"), coded(404, "x")],
        AccountRefused: [coded(403, "Forbidden.AccessDenied.AccessTokenPermissionDenied")],
        RetryLater: [coded(403, "Forbidden.AccessDenied.QpsLimitForApi"), coded(429, "Throttling.Api")],
        Transient: [(500, ""), (503, "")],
    },
    "wecom": {
        EffectFailed: [(200, {"errcode": code, "errmsg": "m"}) for code in (40003, 44004, 60111, 81013, 82001, 86003)],
        AccountRefused: [
            (200, {"errcode": code, "errmsg": "m"})
            for code in (40001, 40013, 40056, 48002, 50003, 60011, 60020, 301002)
        ],
        RetryLater: [(200, {"errcode": code, "errmsg": "m"}) for code in (45009, 45033)],
        Transient: [(200, {"errcode": -1, "errmsg": "m"})],
    },
    "qq": {
        EffectFailed: [coded(400, code) for code in (304031, 40034006, 50006)],
        RetryLater: [coded(400, 22009), coded(400, 304045), (429, "")],
        Transient: [(500, "")],
    },
}


@pytest.mark.parametrize(
    ("name", "kind", "status", "body"),
    [
        (name, kind, status, body)
        for name, kinds in ERRORS.items()
        for kind, answers in kinds.items()
        for status, body in answers
    ],
)
async def test_a_documented_error_is_told_apart(
    outgoing: Outgoing, name: str, kind: type[Exception], status: int, body: Any
) -> None:
    async with examples()[name].fake as fake:
        adapter = Adapter(name, fake, outgoing)
        place, more = PLACES.get(name, "1"), {"answers": "m1"} if name == "qq" else {}
        # The token is fetched before.
        await adapter.send("first", place, "d0", part=1, **more)
        fake.faults.append(answer(status, body))
        with pytest.raises(kind) as refused:
            await adapter.send("second", place, "d1", part=2, **more)
        assert type(refused.value) is kind or kind is EffectFailed
        assert isinstance(refused.value, AccountRefused) is (kind is AccountRefused)
        assert fake.texts() == ["first"]
