"""The conversation that a run continues: the messages that it answers, and the earlier part of the session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, SubjectKeys
from infra.web import data_urls
from services.agent.models.contract import AssistantTurn, Image, Turn, UserTurn
from services.agent.runs.content import Unsealer
from services.agent.sessions.arrivals import Context
from services.agent.sessions.changes import DELETED_TEXT

# The most of the earlier conversation that the model is shown. If there is more, the newest half stays verbatim and the
# older part is summarised.
HISTORY_MESSAGES = 40
HISTORY_CHARACTERS = 40_000
# How many of the parent's newest messages a branched conversation is shown before its own.
PARENT_MESSAGES = 6

NOTHING = Context(())


@dataclass(frozen=True)
class EarlierRun:
    """The messages of an earlier run and its reply."""

    turns: tuple[UserTurn | AssistantTurn, ...]
    seq: int
    """Of the run's last message."""
    about: frozenset[str]
    """The subjects whose words are in it."""

    @property
    def size(self) -> int:
        return sum(len(turn.text) for turn in self.turns)


@dataclass(frozen=True)
class SessionSummary:
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
    """The vendor's id of the message to reply to, the last one; None if the run came by the API."""
    summary: SessionSummary | None = None
    """Of everything before `older` and `history`."""
    older: tuple[EarlierRun, ...] = ()
    """The part that is to be summarised before the model is asked."""
    given: Context = NOTHING
    """The context that the caller gave with the message."""
    images: tuple[Image, ...] = ()
    """Of the messages that the run answers."""
    approvers: tuple[str, ...] = ()
    """The channel's; empty: the agent's."""
    is_changed: bool = False
    """One of the messages was deleted, or its author erased: earlier steps were made with its former text."""

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


async def later_messages(tx: Tx, subjects: SubjectKeys, run_id: UUID, skip: int) -> list[UserTurn]:
    """The run's messages after the first `skip`, with their images. The text of an erased person is empty."""
    unsealer = Unsealer(tx, subjects)
    rows = await tx.sql(
        """
        SELECT message_id, subject_id, text, context
        FROM message
        WHERE run_id = $1 AND NOT decides
        ORDER BY seq
        OFFSET $2
        """,
        run_id,
        skip,
    )
    turns = []
    for id_, subject, sealed, context in rows:
        text = await unsealer.open(sealed, subject, str(id_), "text") or ""
        given = await unsealer.open(context, subject, str(id_), "context") if context else None
        turns.append(UserTurn(text, msgspec.json.decode(given, type=Context).images if given else ()))
    return turns


class MessageRow(NamedTuple):
    """A stored message of a run. Its contents are sealed."""

    seq: int
    id: UUID
    subject_id: str
    text: bytes
    conversation: bytes | None
    vendor_message_id: str | None
    context: bytes | None


class ExchangeRow(NamedTuple):
    """A message of an earlier run, with that run's reply. The texts are sealed."""

    run_id: UUID
    seq: int
    message_id: UUID
    subject_id: str
    text: bytes
    reply_subject_id: str
    reply: bytes | None
    is_answer: bool
    """A member or a client of the API wrote it to the person, in place of the agent."""


class SummaryRow(NamedTuple):
    """The stored summary of a session."""

    sealed: bytes
    subject_id: str
    about: Sequence[str]
    seq: int


class TenantKeys:
    """The keys of the subjects of one tenant."""

    def __init__(self, tenant_id: str, keys: Mapping[tuple[str, str], DataKey | None]) -> None:
        self._tenant_id = tenant_id
        self._keys = keys

    def get(self, subject_id: str) -> DataKey | None:
        """None if the subject was erased."""
        return self._keys[self._tenant_id, subject_id]

    def open(self, sealed: bytes, subject_id: str, *context: str) -> str | None:
        """The text in plain; None if the subject was erased."""
        key = self.get(subject_id)
        return key.open(sealed, self._tenant_id, subject_id, *context) if key else None


def assemble(
    messages: Sequence[MessageRow],
    summary: SessionSummary | None,
    earlier: Sequence[ExchangeRow],
    of_parent: Sequence[ExchangeRow],
    keys: TenantKeys,
) -> Conversation:
    """`earlier`: the messages after the summary, oldest first. `of_parent`: the last ones of the parent session.

    Raises Erased if all authors of `messages` were erased.
    """
    texts = [keys.open(message.text, message.subject_id, str(message.id), "text") for message in messages]
    readable = [text for text in texts if text is not None]
    if not readable:
        raise Erased("the authors of all messages of the run were erased")
    last = next(message for message, text in zip(reversed(messages), reversed(texts), strict=True) if text is not None)
    contexts = [
        msgspec.json.decode(given, type=Context)
        for message in messages
        if message.context and (given := keys.open(message.context, message.subject_id, str(message.id), "context"))
    ]
    context = next((one for one in reversed(contexts) if one.is_complete), None)
    older, newer = divided([] if context else _exchanges(keys, earlier))
    parent = _exchanges(keys, of_parent)
    return Conversation(
        text="\n".join(readable),
        history=context.history
        if context
        else tuple(turn for exchange in (*parent, *newer) for turn in exchange.turns),
        summary=None if context else summary,
        older=tuple(older),
        conversation_id=keys.open(last.conversation, last.subject_id, str(last.id), "conversation")
        if last.conversation
        else None,
        reply_to=last.vendor_message_id,
        given=context or NOTHING,
        images=tuple(image for one in contexts for image in one.images),
        approvers=next((one.approvers for one in reversed(contexts) if one.approvers), ()),
        is_changed=None in texts or DELETED_TEXT in texts,
    )


def open_summary(row: SummaryRow, session_key: str, keys: TenantKeys) -> SessionSummary | None:
    """None if one of the persons whose words it contains was erased."""
    if any(keys.get(subject) is None for subject in row.about):
        return None
    text = keys.open(row.sealed, row.subject_id, f"{session_key}/{row.seq}", "summary")
    return SessionSummary(text, row.seq, frozenset(row.about)) if text else None


def _exchanges(keys: TenantKeys, rows: Sequence[ExchangeRow]) -> list[EarlierRun]:
    return [_exchange(keys, list(of_run)) for _, of_run in groupby(rows, lambda row: row.run_id)]


def _exchange(keys: TenantKeys, rows: Sequence[ExchangeRow]) -> EarlierRun:
    """Without the words of erased persons."""
    texts = [keys.open(row.text, row.subject_id, str(row.message_id), "text") for row in rows]
    last = rows[-1]
    turns: list[UserTurn | AssistantTurn] = []
    if said := "\n".join(text for text in texts if text is not None):
        turns.append(AssistantTurn(said) if last.is_answer else UserTurn(said))
    if last.reply and (reply := keys.open(last.reply, last.reply_subject_id, str(last.run_id), "reply")):
        turns.append(AssistantTurn(data_urls.named(reply)))
    return EarlierRun(tuple(turns), last.seq, frozenset(row.subject_id for row in rows) | {last.reply_subject_id})


def divided(exchanges: Sequence[EarlierRun]) -> tuple[Sequence[EarlierRun], Sequence[EarlierRun]]:
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


async def keep_summary(
    tx: Tx, key: DataKey, subject_id: str, session_key: str, run_id: UUID, summary: SessionSummary
) -> None:
    """Stores the summary for later runs, unless the stored one covers more, or a message was deleted since the run
    began: the summary may have its words."""
    assert tx.tenant_id
    await tx.sql(
        """
        UPDATE session
        SET summary = $3, summary_subject = $4, summary_about = $5, summary_seq = $6
        WHERE tenant_id = $1 AND session_key = $2 AND summary_seq < $6
            -- The two times are of different clocks.
            AND (message_deleted_at IS NULL
                OR message_deleted_at < (SELECT started_at - interval '1 minute' FROM run WHERE id = $7))
        """,
        tx.tenant_id,
        session_key,
        key.seal(summary.text, tx.tenant_id, subject_id, f"{session_key}/{summary.seq}", "summary"),
        subject_id,
        sorted(summary.about | {subject_id}),
        summary.seq,
        run_id,
    )
