"""Strict fakes of the vendors' APIs, for tests and the demo. No vendor is ever called.

Each is a real HTTP server on the loopback interface. It refuses the requests that the vendor would refuse, injects
faults on demand, and keeps a ledger of the messages it accepted.
"""

from tooling.testing.vendors.dingtalk import DingTalkStandIn
from tooling.testing.vendors.discord import DiscordStandIn
from tooling.testing.vendors.feishu import FeishuStandIn
from tooling.testing.vendors.line import LineStandIn
from tooling.testing.vendors.qq import QQStandIn
from tooling.testing.vendors.server import Accepted, Fault, answer, cut, hang, hold
from tooling.testing.vendors.slack import SlackStandIn
from tooling.testing.vendors.teams import TeamsStandIn
from tooling.testing.vendors.telegram import TelegramStandIn
from tooling.testing.vendors.twilio import TwilioStandIn
from tooling.testing.vendors.webhook import WebhookStandIn
from tooling.testing.vendors.wecom import WeComStandIn
from tooling.testing.vendors.whatsapp import WhatsAppStandIn

__all__ = (
    "Accepted",
    "DingTalkStandIn",
    "DiscordStandIn",
    "Fault",
    "FeishuStandIn",
    "LineStandIn",
    "QQStandIn",
    "SlackStandIn",
    "TeamsStandIn",
    "TelegramStandIn",
    "TwilioStandIn",
    "WeComStandIn",
    "WebhookStandIn",
    "WhatsAppStandIn",
    "answer",
    "cut",
    "hang",
    "hold",
)
