"""Local stand-ins for vendors: real HTTP servers that refuse what the vendor would refuse, break down when told to,
and keep a ledger of what they accepted. For tests and for the demo; no vendor is ever called.
"""

from tooling.testing.vendors.server import Accepted, Fault, answer, cut, hang, hold
from tooling.testing.vendors.slack import SlackStandIn
from tooling.testing.vendors.telegram import TelegramStandIn
from tooling.testing.vendors.webhook import WebhookStandIn

__all__ = ("Accepted", "Fault", "SlackStandIn", "TelegramStandIn", "WebhookStandIn", "answer", "cut", "hang", "hold")
