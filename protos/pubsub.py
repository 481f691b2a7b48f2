"""Redis channels that one service publishes to and another one listens to; no message on them is kept."""

from collections.abc import Mapping
from typing import Final

RUN_DELTAS = "claw:run:"
"""The channel is this prefix and the run's id. Agent publishes the text of an answer while the model writes it, as
``{"step", "attempt", "n", "text"}``; ws gateway listens."""

RUN_PROGRESS = "claw:progress"
"""Agent publishes, while it executes a run that came from a channel for longer than two seconds, that it is at work
and the text so far, as ``{"run_id", "session_key", "text"}``, and with ``"over": true`` that it has ended and sends
nothing; channel listens."""

CONFIG_CHANGED = "openclaw:config:changed"
"""Plugin publishes `PluginChanged` as JSON, for processes that cache tools."""

QUOTA_EXHAUSTED = "openclaw:quota:exhausted"
"""Billing publishes `QuotaExhausted`, and `BudgetThresholdPassed` at 100 %, as JSON."""

CHANNELS: Final[Mapping[str, tuple[str, ...]]] = {
    "agent": (f"{RUN_DELTAS}*", RUN_PROGRESS),
    "ws_gateway": (f"{RUN_DELTAS}*",),
    "channel": (RUN_PROGRESS,),
    "plugin": (CONFIG_CHANGED,),
    "billing": (QUOTA_EXHAUSTED,),
}
"""Service → the channels that its account of Redis may use. Another service has none."""
