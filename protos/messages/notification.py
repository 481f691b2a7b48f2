"""What other services ask notification to send. The tenant is in the envelope."""

from __future__ import annotations

from uuid import UUID

from protos.envelope import Message


class SendEmail(Message, frozen=True, kw_only=True):
    """Send one e-mail in plain text. to: one address; empty: the tenant's owners, whom notification looks up."""

    to: str
    subject: str
    text: str


class SendPush(Message, frozen=True, kw_only=True):
    """Show one notification on all devices of a user."""

    user_id: UUID
    title: str
    text: str
