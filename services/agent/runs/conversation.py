"""What was said: the messages that a run answers, and what came before them in the session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from uuid import UUID

import msgspec

from infra.crypto import DataKey
from infra.subjects import Erased, SubjectKeys
from infra.tx import Tx
from services.agent.models.contract import Answered, Said, Turn
from services.agent.sessions.intake import Context

# Of what came before in the session, the model is shown so much at most, the newest.
HISTORY_MESSAGES = 40
HISTORY_CHARACTERS = 40_000


@dataclass(frozen=True)
class Asked:
    """The messages of a run as one, and what came before. conversation_id, reply_to: None where no channel is.

    instructions: what the caller adds to the agent's own.
    """

    text: str
    history: tuple[Turn, ...]
    conversation_id: str | None
    reply_to: str | None
    instructions: str | None = None

    def system(self, own: str) -> str:
        """The agent's `own` system prompt, and behind it, marked as such, what the caller adds."""
        if self.instructions is None:
            return own
        added = f"Whoever asks through the API adds these instructions:\n\n{self.instructions}"
        return f"{own}\n\n{added}" if own else added


class Reader:
    """Opens sealed content within one transaction, reading each subject's key once."""

    def __init__(self, tx: Tx, subjects: SubjectKeys) -> None:
        assert tx.tenant_id
        self._tx = tx
        self._tenant_id = tx.tenant_id
        self._subjects = subjects
        self._keys: dict[str, DataKey | None] = {}

    async def open(self, sealed: bytes, subject_id: str, *context: str) -> str | None:
        """None where the subject was erased."""
        if subject_id not in self._keys:
            try:
                self._keys[subject_id] = await self._subjects.key(self._tx, self._tenant_id, subject_id)
            except Erased:
                self._keys[subject_id] = None
        key = self._keys[subject_id]
        return key.open(sealed, self._tenant_id, subject_id, *context) if key else None


async def load(tx: Tx, subjects: SubjectKeys, run_id: UUID, session_key: str) -> Asked:
    """Raises Erased where nothing that the run was to answer can be read any more."""
    reader = Reader(tx, subjects)
    rows = await tx.sql(
        "SELECT seq, message_id, subject_id, text, conversation, vendor_message_id, context FROM message "
        "WHERE run_id = $1 ORDER BY seq",
        run_id,
    )
    texts = [await reader.open(text, subject, str(id_), "text") for _, id_, subject, text, *_ in rows]
    readable = [text for text in texts if text is not None]
    if not readable:
        raise Erased(f"run {run_id}: all that it answers was erased")
    _, message_id, subject_id, _, conversation, vendor_message_id, sealed = next(
        row for row, text in zip(reversed(rows), reversed(texts), strict=True) if text is not None
    )
    given = await reader.open(sealed, subject_id, str(message_id), "context") if sealed else None
    context = msgspec.json.decode(given, type=Context) if given else None
    return Asked(
        text="\n".join(readable),
        history=context.history if context else await _history(tx, reader, session_key, rows[0][0]),
        conversation_id=await reader.open(conversation, subject_id, str(message_id), "conversation")
        if conversation
        else None,
        reply_to=vendor_message_id,
        instructions=context.system if context else None,
    )


async def _history(tx: Tx, reader: Reader, session_key: str, before: int) -> tuple[Turn, ...]:
    rows = await tx.sql(
        "SELECT m.run_id, m.message_id, m.subject_id, m.text, r.subject_id, r.reply "
        "FROM message m JOIN run r ON r.id = m.run_id "
        "WHERE m.tenant_id = $1 AND m.session_key = $2 AND m.seq < $3 ORDER BY m.seq DESC LIMIT $4",
        tx.tenant_id,
        session_key,
        before,
        HISTORY_MESSAGES,
    )
    exchanges = [
        await _exchange(reader, list(messages)) for _, messages in groupby(reversed(rows), key=lambda row: row[0])
    ]
    kept: list[Turn] = []
    left = HISTORY_CHARACTERS
    for exchange in reversed(exchanges):
        left -= sum(len(turn.text) for turn in exchange)
        if left < 0:
            break
        kept[:0] = exchange
    return tuple(kept)


async def _exchange(reader: Reader, messages: Sequence[tuple[Any, ...]]) -> list[Said | Answered]:
    """The messages of one earlier run and its reply, as far as they can still be read."""
    texts = [await reader.open(text, subject, str(id_), "text") for _, id_, subject, text, _, _ in messages]
    run_id, _, _, _, subject_id, sealed = messages[0]
    turns: list[Said | Answered] = []
    if said := "\n".join(text for text in texts if text is not None):
        turns.append(Said(said))
    if sealed and (reply := await reader.open(sealed, subject_id, str(run_id), "reply")):
        turns.append(Answered(reply))
    return turns
