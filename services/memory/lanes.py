"""The lanes in which memory processes documents, replies and memories. `handlers` does the work."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal
from uuid import UUID

import msgspec

from infra.lanes.lane import Lane
from infra.postgres.lane_items import AT_ONCE
from infra.postgres.tx import Tx


class DocumentWork(msgspec.Struct, frozen=True):
    document_id: UUID
    act: Literal["index", "fill", "remove", "remove_version"]
    """fill: of a former version of this service, now `FillWork`. remove_version: remove a version that was replaced."""
    path: str = ""
    """Of the replaced version's file."""
    owner: UUID | None = None
    """Of the replaced version's rows in the index."""


class FillWork(msgspec.Struct, frozen=True):
    """Put an indexed document into the index of a model again, after the model has embedded it if it had not."""

    document_id: UUID
    model: str
    """The key of its vectors."""
    owner: UUID | None = None
    """Of the rows of the version that was the newest at that time."""


class UtteranceWork(msgspec.Struct, frozen=True):
    run_id: UUID
    act: Literal["embed", "forget"]


class MemoryWork(msgspec.Struct, frozen=True):
    """Embed a memory."""

    memory_id: UUID


# One lane per document.
DOCUMENTS = Lane("documents", DocumentWork)
# One lane per model and document. Not those of `DOCUMENTS`: a new document must not wait for all the old ones.
FILLS = Lane("fills", FillWork)
# One lane per act and run: an item that is due in a month must not block any other item.
UTTERANCES = Lane("utterances", UtteranceWork)
MEMORIES = Lane("memories", MemoryWork)


def enqueue_document(tx: Tx, document_id: UUID, act: Literal["index", "remove"]) -> None:
    tx.enqueue(DOCUMENTS, lane=str(document_id), item=DocumentWork(document_id, act))


def enqueue_fill(tx: Tx, document_id: UUID, model: str, owner: UUID | None) -> None:
    tx.enqueue(FILLS, lane=f"{model} {document_id}", item=FillWork(document_id, model, owner))


def enqueue_memory(tx: Tx, memory_id: UUID) -> None:
    tx.enqueue(MEMORIES, lane=str(memory_id), item=MemoryWork(memory_id))


def enqueue_utterance(tx: Tx, run_id: UUID, act: Literal["embed", "forget"], after: timedelta = AT_ONCE) -> None:
    tx.enqueue(UTTERANCES, lane=f"{act} {run_id}", item=UtteranceWork(run_id, act), after=after)
