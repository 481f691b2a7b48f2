"""What a session remembers, one stream each."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec


class MessageAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A person's message was stored, and the run that will answer it is settled.

    opens: that run is new. waits: it begins a moment later, for more may come. text: sealed under the subject's key.
    decides: it lets the run, which waited for that, go on, and is no question.
    """

    message_id: UUID
    run_id: UUID
    opens: bool
    waits: bool
    subject_id: str
    text: bytes
    at: datetime
    decides: bool = False


Event = MessageAccepted
