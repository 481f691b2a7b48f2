"""What the desk receives."""

from __future__ import annotations

from infra.errors import InvalidMessage
from infra.testing.sample.catalog import SAMPLE_WORK
from infra.testing.sample.desk.domain import WriteNote
from infra.testing.sample.desk.publishing import NOTEBOOK
from infra.tx import Tx
from protos.messages.sample import TakeNote


@SAMPLE_WORK.worker(prefetch=20)
async def take_note(message: TakeNote, tx: Tx) -> None:
    if not message.notebook:
        raise InvalidMessage("notebook", "is empty")
    await tx.decide(NOTEBOOK.stream(message.notebook), WriteNote(message.text))
