"""The kernel's sample: the front takes notes, the desk stores them, the ledger counts them.

Not part of the product: crash tests and benches use it.
"""

from __future__ import annotations

from protos.envelope import Message


class TakeNote(Message, frozen=True, kw_only=True):
    """Work for the desk: write `text` into the notebook called `notebook`."""

    notebook: str
    text: str


class NoteTaken(Message, frozen=True, kw_only=True):
    """The `number`-th note of a notebook, counted from 1."""

    notebook: str
    number: int
    text: str
