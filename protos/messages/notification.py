"""Notification: messages that other services ask it to send. The tenant is in the envelope."""

from __future__ import annotations

from uuid import UUID

import msgspec

from protos.envelope import Message


class Attachment(msgspec.Struct, frozen=True):
    """A file that goes along with an e-mail."""

    name: str
    media_type: str
    content: bytes
    """On the wire in base64."""


class SendEmail(Message, frozen=True, kw_only=True):
    """Send one e-mail in plain text."""

    to: str
    """One address; empty for the tenant's owners, whose addresses notification looks up."""
    subject: str
    text: str
    attachment: Attachment | None = None


class SendPush(Message, frozen=True, kw_only=True):
    """Show one notification on all devices of a user."""

    user_id: UUID
    title: str
    text: str
