"""What was said: the messages that a run answers, and what came before them in the session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from services.agent.models.contract import Answered, Said, Turn
from services.agent.sessions.intake import Context

# Of what came before, the model is shown so much at most. Where it is more, the newest half stays as it was said, and
# what is older is put in short.
HISTORY_MESSAGES = 40
HISTORY_CHARACTERS = 40_000
# So much is read of it, the newest.
MOST_MESSAGES = 400

NOTHING = Context(())


@dataclass(frozen=True)
class Exchange:
    """The messages of an earlier run and its reply. seq: of its last message; about: whose words they are."""

    turns: tuple[Said | Answered, ...]
    seq: int
    about: frozenset[str]

    @property
    def size(self) -> int:
        return sum(len(turn.text) for turn in self.turns)


@dataclass(frozen=True)
class Summary:
    """What was said up to the message `seq`, in short. about: whose words are in it."""

    text: str
    seq: int
    about: frozenset[str]


@dataclass(frozen=True)
class Asked:
    """The messages of a run as one, and what came before. conversation_id, reply_to: None where no channel is.

    summary: of what came before all that is here. older: what is to be put in short before the model is asked.
    given: what else the caller has given along.
    """

    text: str
    history: tuple[Turn, ...]
    conversation_id: str | None
    reply_to: str | None
    summary: Summary | None = None
    older: tuple[Exchange, ...] = ()
    given: Context = NOTHING

    def system(self, own: str) -> str:
        """The agent's `own` system prompt, and behind it, marked as such, what the caller adds."""
        if self.given.system is None:
            return own
        added = f"Whoever asks through the API adds these instructions:\n\n{self.given.system}"
        return f"{own}\n\n{added}" if own else added

    def output_schema(self, own: dict[str, Any] | None) -> dict[str, Any] | None:
        """What the answer has to fit: what the caller asks for, else the agent's `own`."""
        asked = self.given.output_schema
        # Any object: the agent's own asks for one, too.
        return own if asked is None or (asked == {"type": "object"} and own is not None) else asked


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
        key = await self._key(subject_id)
        return key.open(sealed, self._tenant_id, subject_id, *context) if key else None

    async def knows(self, subject_id: str) -> bool:
        """False where the subject was erased."""
        return await self._key(subject_id) is not None

    async def key(self, subject_id: str) -> DataKey:
        """Raises Erased."""
        if (key := await self._key(subject_id)) is None:
            raise Erased(f"subject {subject_id} was erased")
        return key

    async def _key(self, subject_id: str) -> DataKey | None:
        if subject_id not in self._keys:
            try:
                self._keys[subject_id] = await self._subjects.key(self._tx, self._tenant_id, subject_id)
            except Erased:
                self._keys[subject_id] = None
        return self._keys[subject_id]


async def count(tx: Tx, run_id: UUID) -> int:
    """How many messages the run has to answer."""
    [(messages,)] = await tx.sql("SELECT count(*) FROM message WHERE run_id = $1 AND NOT decides", run_id)
    return int(messages)


async def arrived(tx: Tx, subjects: SubjectKeys, run_id: UUID, skipped: int) -> list[str]:
    """The texts of the run's messages behind the first so many; empty where the person was erased."""
    reader = Reader(tx, subjects)
    rows = await tx.sql(
        "SELECT message_id, subject_id, text FROM message WHERE run_id = $1 AND NOT decides ORDER BY seq OFFSET $2",
        run_id,
        skipped,
    )
    return [await reader.open(text, subject, str(id_), "text") or "" for id_, subject, text in rows]


async def load(tx: Tx, reader: Reader, run_id: UUID, session_key: str, first: int) -> Asked:
    """The first so many messages of the run. Raises Erased where none of them can be read any more."""
    rows = await tx.sql(
        "SELECT seq, message_id, subject_id, text, conversation, vendor_message_id, context FROM message "
        "WHERE run_id = $1 AND NOT decides ORDER BY seq LIMIT $2",
        run_id,
        first,
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
    summary = None if context else await _summary(tx, reader, session_key, rows[0][0])
    exchanges = [] if context else await _exchanges(tx, reader, session_key, summary.seq if summary else 0, rows[0][0])
    older, newer = divided(exchanges)
    return Asked(
        text="\n".join(readable),
        history=context.history if context else tuple(turn for exchange in newer for turn in exchange.turns),
        summary=summary,
        older=tuple(older),
        conversation_id=await reader.open(conversation, subject_id, str(message_id), "conversation")
        if conversation
        else None,
        reply_to=vendor_message_id,
        given=context or NOTHING,
    )


def divided(exchanges: Sequence[Exchange]) -> tuple[Sequence[Exchange], Sequence[Exchange]]:
    """What is to be put in short, and what stays as it was said."""
    turns, size = sum(len(exchange.turns) for exchange in exchanges), sum(exchange.size for exchange in exchanges)
    if turns <= HISTORY_MESSAGES and size <= HISTORY_CHARACTERS:
        return (), exchanges
    turns = size = 0
    for n, exchange in enumerate(reversed(exchanges)):
        turns, size = turns + len(exchange.turns), size + exchange.size
        if turns > HISTORY_MESSAGES // 2 or size > HISTORY_CHARACTERS // 2:
            return exchanges[: len(exchanges) - n], exchanges[len(exchanges) - n :]
    return (), exchanges


async def _summary(tx: Tx, reader: Reader, session_key: str, before: int) -> Summary | None:
    rows = await tx.sql(
        "SELECT summary, summary_subject, summary_about, summary_seq FROM session "
        "WHERE tenant_id = $1 AND session_key = $2 AND summary IS NOT NULL AND summary_seq < $3",
        tx.tenant_id,
        session_key,
        before,
    )
    if not rows:
        return None
    [(sealed, subject_id, about, seq)] = rows
    # With a person's key goes all that was made of that person's words.
    if not all([await reader.knows(subject) for subject in about]):
        return None
    text = await reader.open(sealed, subject_id, f"{session_key}/{seq}", "summary")
    return Summary(text, seq, frozenset(about)) if text else None


async def keep_summary(tx: Tx, key: DataKey, subject_id: str, session_key: str, summary: Summary) -> None:
    """For the runs to come; one that reaches further stays."""
    assert tx.tenant_id
    await tx.sql(
        "UPDATE session SET summary = $3, summary_subject = $4, summary_about = $5, summary_seq = $6 "
        "WHERE tenant_id = $1 AND session_key = $2 AND summary_seq < $6",
        tx.tenant_id,
        session_key,
        key.seal(summary.text, tx.tenant_id, subject_id, f"{session_key}/{summary.seq}", "summary"),
        subject_id,
        sorted(summary.about | {subject_id}),
        summary.seq,
    )


async def _exchanges(tx: Tx, reader: Reader, session_key: str, after: int, before: int) -> list[Exchange]:
    """What was said between two messages, the oldest first."""
    rows = await tx.sql(
        "SELECT m.run_id, m.seq, m.message_id, m.subject_id, m.text, r.subject_id, r.reply "
        "FROM message m JOIN run r ON r.id = m.run_id WHERE m.tenant_id = $1 AND m.session_key = $2 AND m.seq > $3 "
        "AND m.seq < $4 AND NOT m.decides ORDER BY m.seq DESC LIMIT $5",
        tx.tenant_id,
        session_key,
        after,
        before,
        MOST_MESSAGES,
    )
    return [await _exchange(reader, list(messages)) for _, messages in groupby(reversed(rows), key=lambda row: row[0])]


async def _exchange(reader: Reader, messages: Sequence[tuple[Any, ...]]) -> Exchange:
    """As far as it can still be read."""
    texts = [await reader.open(text, subject, str(id_), "text") for _, _, id_, subject, text, _, _ in messages]
    run_id, seq, _, _, _, subject_id, sealed = messages[-1]
    turns: list[Said | Answered] = []
    if said := "\n".join(text for text in texts if text is not None):
        turns.append(Said(said))
    if sealed and (reply := await reader.open(sealed, subject_id, str(run_id), "reply")):
        turns.append(Answered(reply))
    return Exchange(tuple(turns), seq, frozenset(row[3] for row in messages) | {subject_id})
