"""Every message that the desk receives."""

from __future__ import annotations

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from protos.messages.sample import TakeNote
from tooling.testing.sample.catalog import SAMPLE_WORK
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK


@SAMPLE_WORK.worker(prefetch=20)
async def take_note(message: TakeNote, tx: Tx) -> None:
    if not message.notebook:
        raise InvalidMessage("notebook", "is empty")
    await tx.decide(NOTEBOOK.stream(message.notebook), WriteNote(message.text))
