"""The examples of all vendors."""

from __future__ import annotations

from tests.services.channel.vendors import kinds_of_apps, kinds_of_messengers, kinds_of_offices
from tests.services.channel.vendors.kinds import Examples


def examples() -> dict[str, Examples]:
    return {
        "telegram": kinds_of_apps.telegram(),
        "slack": kinds_of_apps.slack(),
        "discord": kinds_of_apps.discord(),
        "teams": kinds_of_apps.teams(),
        "whatsapp": kinds_of_messengers.whatsapp(),
        "line": kinds_of_messengers.line(),
        "twilio": kinds_of_messengers.twilio(),
        "qq": kinds_of_messengers.qq(),
        "webhook": kinds_of_messengers.webhook(),
        "feishu": kinds_of_offices.feishu(),
        "dingtalk": kinds_of_offices.dingtalk(),
        "wecom": kinds_of_offices.wecom(),
    }
