"""Memory's own work."""

from __future__ import annotations

from uuid import UUID

from protos.envelope import Message


class IndexDocument(Message, frozen=True, kw_only=True):
    """Parse, chunk and embed a stored document. Where its bytes lie is memory's own knowledge."""

    document_id: UUID
