"""Memory: the work that it sends to itself."""

from __future__ import annotations

from uuid import UUID

from protos.envelope import Message


class IndexDocument(Message, frozen=True, kw_only=True):
    """Parse, chunk and embed a stored document. Memory knows the place of its bytes."""

    document_id: UUID
