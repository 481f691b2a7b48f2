"""The conversation that a run continues: the messages that it answers, and the earlier part of the session."""

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
from services.agent.runs.content import Unsealer
from services.agent.sessions.intake import Context

# The most of the earlier conversation that the model is shown. If there is more, the newest half stays verbatim and the
# older part is summarised.
HISTORY_MESSAGES = 40
HISTORY_CHARACTERS = 40_000
# How many of the newest messages are read.
MOST_MESSAGES = 400
# How many of the parent's newest messages a branched conversation is shown before its own.
PARENT_MESSAGES = 6

NOTHING = Context(())


@dataclass(frozen=True)
class Exchange:
    """The messages of an earlier run and its reply."""

    turns: tuple[Said | Answered, ...]
    seq: int
    """Of the run's last message."""
    about: frozenset[str]
    """The subjects whose words are in it."""

    @property
    def size(self) -> int:
        return sum(len(turn.text) for turn in self.turns)


@dataclass(frozen=True)
class Summary:
    """A summary of the session."""

    text: str
    seq: int
    """Of the last message that it covers."""
    about: frozenset[str]
    """The subjects whose words are in it."""


@dataclass(frozen=True)
class Conversation:
    """The messages that a run answers, as one text, and the earlier part of the session."""

    text: str
    history: tuple[Turn, ...]
    """The part that the model is shown verbatim."""
    conversation_id: str | None
    """The vendor's id; None if the run came by the API."""
    reply_to: str | None
    """The vendor's id of the message to reply to; None if the run came by the API."""
    summary: Summary | None = None
    """Of everything before `older` and `history`."""
    older: tuple[Exchange, ...] = ()
    """The part that is to be summarised before the model is asked."""
    given: Context = NOTHING
    """The context that the caller gave with the message."""

    def system(self, own: str) -> str:
        """The agent's `own` system prompt, followed by the caller's instructions, which are marked as such."""
        if self.given.system is None:
            return own
        added = f"The caller of the API adds these instructions:\n\n{self.given.system}"
        return f"{own}\n\n{added}" if own else added

    def output_schema(self, own: dict[str, Any] | None) -> dict[str, Any] | None:
        """The JSON Schema of the answer: the caller's, or else the agent's `own`."""
        asked = self.given.output_schema
        # A caller that asks for any object gets the agent's own schema, which also asks for an object.
        return own if asked is None or (asked == {"type": "object"} and own is not None) else asked


async def count_messages(tx: Tx, run_id: UUID) -> int:
    """How many messages the run has to answer."""
    [(messages,)] = await tx.sql("SELECT count(*) FROM message WHERE run_id = $1 AND NOT decides", run_id)
    return int(messages)


async def later_messages(tx: Tx, subjects: SubjectKeys, run_id: UUID, skip: int) -> list[str]:
    """The texts of the run's messages after the first `skip`. The text of an erased person is empty."""
    unsealer = Unsealer(tx, subjects)
    rows = await tx.sql(
        """
        SELECT message_id, subject_id, text
        FROM message
        WHERE run_id = $1 AND NOT decides
        ORDER BY seq
        OFFSET $2
        """,
        run_id,
        skip,
    )
    return [await unsealer.open(text, subject, str(id_), "text") or "" for id_, subject, text in rows]


async def load(tx: Tx, unsealer: Unsealer, run_id: UUID, session_key: str, first: int) -> Conversation:
    """The conversation with the first `first` messages of the run. Raises Erased if all their authors were erased."""
    rows = await tx.sql(
        """
        SELECT seq, message_id, subject_id, text, conversation, vendor_message_id, context
        FROM message
        WHERE run_id = $1 AND NOT decides
        ORDER BY seq
        LIMIT $2
        """,
        run_id,
        first,
    )
    texts = [await unsealer.open(text, subject, str(id_), "text") for _, id_, subject, text, *_ in rows]
    readable = [text for text in texts if text is not None]
    if not readable:
        raise Erased(f"run {run_id}: the authors of all its messages were erased")
    _, message_id, subject_id, _, conversation, vendor_message_id, sealed = next(
        row for row, text in zip(reversed(rows), reversed(texts), strict=True) if text is not None
    )
    given = await unsealer.open(sealed, subject_id, str(message_id), "context") if sealed else None
    context = msgspec.json.decode(given, type=Context) if given else None
    summary = None if context else await _summary(tx, unsealer, session_key, rows[0][0])
    exchanges = (
        [] if context else await _exchanges(tx, unsealer, session_key, summary.seq if summary else 0, rows[0][0])
    )
    older, newer = divided(exchanges)
    # Only a conversation in a channel has a parent.
    parent = await _parent_exchanges(tx, unsealer, session_key) if conversation and not context else []
    return Conversation(
        text="\n".join(readable),
        history=context.history
        if context
        else tuple(turn for exchange in (*parent, *newer) for turn in exchange.turns),
        summary=summary,
        older=tuple(older),
        conversation_id=await unsealer.open(conversation, subject_id, str(message_id), "conversation")
        if conversation
        else None,
        reply_to=vendor_message_id,
        given=context or NOTHING,
    )


def divided(exchanges: Sequence[Exchange]) -> tuple[Sequence[Exchange], Sequence[Exchange]]:
    """The part to be summarised, and the part that stays verbatim."""
    turns, size = sum(len(exchange.turns) for exchange in exchanges), sum(exchange.size for exchange in exchanges)
    if turns <= HISTORY_MESSAGES and size <= HISTORY_CHARACTERS:
        return (), exchanges
    turns = size = 0
    for n, exchange in enumerate(reversed(exchanges)):
        turns, size = turns + len(exchange.turns), size + exchange.size
        if turns > HISTORY_MESSAGES // 2 or size > HISTORY_CHARACTERS // 2:
            return exchanges[: len(exchanges) - n], exchanges[len(exchanges) - n :]
    return (), exchanges


async def _summary(tx: Tx, unsealer: Unsealer, session_key: str, before: int) -> Summary | None:
    rows = await tx.sql(
        """
        SELECT summary, summary_subject, summary_about, summary_seq
        FROM session
        WHERE tenant_id = $1 AND session_key = $2 AND summary IS NOT NULL AND summary_seq < $3
        """,
        tx.tenant_id,
        session_key,
        before,
    )
    if not rows:
        return None
    [(sealed, subject_id, about, seq)] = rows
    # A summary that contains the words of an erased person is gone, too.
    if not all([await unsealer.has_key(subject) for subject in about]):
        return None
    text = await unsealer.open(sealed, subject_id, f"{session_key}/{seq}", "summary")
    return Summary(text, seq, frozenset(about)) if text else None


async def keep_summary(tx: Tx, key: DataKey, subject_id: str, session_key: str, summary: Summary) -> None:
    """Stores the summary for later runs, unless the stored one covers more."""
    assert tx.tenant_id
    await tx.sql(
        """
        UPDATE session
        SET summary = $3, summary_subject = $4, summary_about = $5, summary_seq = $6
        WHERE tenant_id = $1 AND session_key = $2 AND summary_seq < $6
        """,
        tx.tenant_id,
        session_key,
        key.seal(summary.text, tx.tenant_id, subject_id, f"{session_key}/{summary.seq}", "summary"),
        subject_id,
        sorted(summary.about | {subject_id}),
        summary.seq,
    )


async def _exchanges(tx: Tx, unsealer: Unsealer, session_key: str, after: int, before: int) -> list[Exchange]:
    """The exchanges between two messages, the oldest first."""
    rows = await tx.sql(
        """
        SELECT m.run_id, m.seq, m.message_id, m.subject_id, m.text, r.subject_id, r.reply
        FROM message m JOIN run r ON r.id = m.run_id
        WHERE m.tenant_id = $1 AND m.session_key = $2 AND m.seq > $3 AND m.seq < $4 AND NOT m.decides
        ORDER BY m.seq DESC
        LIMIT $5
        """,
        tx.tenant_id,
        session_key,
        after,
        before,
        MOST_MESSAGES,
    )
    return [
        await _exchange(unsealer, list(messages)) for _, messages in groupby(reversed(rows), key=lambda row: row[0])
    ]


async def _parent_exchanges(tx: Tx, unsealer: Unsealer, session_key: str) -> list[Exchange]:
    """The last exchanges of the parent session before this one branched off, the oldest first."""
    rows = await tx.sql(
        """
        SELECT m.run_id, m.seq, m.message_id, m.subject_id, m.text, r.subject_id, r.reply
        FROM session s
        JOIN message m ON m.tenant_id = s.tenant_id AND m.session_key = s.parent_key AND m.seq <= s.parent_seq
        JOIN run r ON r.id = m.run_id
        WHERE s.tenant_id = $1 AND s.session_key = $2 AND NOT m.decides
        ORDER BY m.seq DESC
        LIMIT $3
        """,
        tx.tenant_id,
        session_key,
        PARENT_MESSAGES,
    )
    return [
        await _exchange(unsealer, list(messages)) for _, messages in groupby(reversed(rows), key=lambda row: row[0])
    ]


async def _exchange(unsealer: Unsealer, messages: Sequence[tuple[Any, ...]]) -> Exchange:
    """Without the words of erased persons."""
    texts = [await unsealer.open(text, subject, str(id_), "text") for _, _, id_, subject, text, _, _ in messages]
    run_id, seq, _, _, _, subject_id, sealed = messages[-1]
    turns: list[Said | Answered] = []
    if said := "\n".join(text for text in texts if text is not None):
        turns.append(Said(said))
    if sealed and (reply := await unsealer.open(sealed, subject_id, str(run_id), "reply")):
        turns.append(Answered(reply))
    return Exchange(tuple(turns), seq, frozenset(row[3] for row in messages) | {subject_id})
