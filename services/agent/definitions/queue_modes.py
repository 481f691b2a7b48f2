"""Queue modes of an agent."""

from __future__ import annotations

from typing import Literal

QueueMode = Literal["collect", "followup", "steer", "interrupt", "reject"]
"""How a message is handled that comes while a run of its session is queued or running.

collect: the next run answers all such messages together. followup: each message has a run of its own. steer: the
running run answers the message, too. interrupt: the running run is cancelled and a new one starts. reject: the message
is refused.
"""
