"""State and decisions of a notebook, pure."""

from __future__ import annotations

from typing import ClassVar

import msgspec


class NoteWritten(msgspec.Struct, frozen=True):
    """A note was written. `number` counts the notebook's notes from 1. Version 1 had `text` under the name ``note``."""

    SCHEMA_VERSION: ClassVar[int] = 2
    number: int
    text: str


class WriteNote(msgspec.Struct, frozen=True):
    text: str


class Notebook(msgspec.Struct, frozen=True):
    notes: int = 0


def decide(command: WriteNote, notebook: Notebook) -> list[NoteWritten]:
    return [NoteWritten(notebook.notes + 1, command.text)]


def evolve(notebook: Notebook, event: NoteWritten) -> Notebook:
    return Notebook(event.number)
