"""The kernel's sample: notes handed in at the front, written down at the desk, totalled in the ledger.

Not part of the product: demo, crash tests and benches run on it.
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
