"""Decisions about a run that waits, and how the run goes on after them."""

from __future__ import annotations

import re
import unicodedata
from uuid import UUID

from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx, derived_id
from services.agent.lanes import queue_run
from services.agent.runs import projections
from services.agent.runs.domain import NotWaiting, Settle, Suspension
from services.agent.runs.events import Decision
from services.agent.runs.publishing import stream

_YES_WORDS = (
    "y yes yep yeah ok okay sure confirm confirmed approve approved allow goahead ja oui si sí sì vale sim да tak так "
    "evet 好 好的 是 是的 嗯 行 可以 同意 批准 确认 确定 はい 네 예 نعم"
)
_NO_WORDS = (
    "n no nope deny denied refuse stop cancel nein non não нет nie hayır "
    "不 不行 不可以 不要 不同意 否 拒绝 取消 いいえ 아니요 아니오 لا"
)
# Without the spaces between words: "go ahead".
_YES, _NO = frozenset(_YES_WORDS.split()), frozenset(_NO_WORDS.split())
# In a group the person has to name the bot: "@bot yes", "<@U0123> yes".
# Without another < inside: otherwise each of many would search the whole rest for its end.
_MENTION = re.compile(r"<@[^<>\n]+>|(?<!\S)@\S+")
# Telegram adds the bot's name to a command.
_COMMAND = re.compile(r"\A\s*(/\w+)@\w+")
_PUNCTUATION = re.compile(r"[.!。,、;:…/*_`\"'“”()-]+")
# Marks without a width and of the style of emoji. Keyboards and clients add them.
_INVISIBLE = re.compile(r"[\u200b-\u200f\u2060\ufe0e\ufe0f\ufeff]")
# A longer text with a yes or a no in it, or at its beginning, is taken as an ordinary message.
_UNCLEAR_WORDS = 4
_UNCLEAR_BEGINNING = 8


def decision_in(text: str) -> Decision | None:
    """The decision in a person's message; None if it says anything else than a yes or a no, besides mentions.

    A question decides nothing: "yes?".
    """
    word = "".join(_words(text))
    return "approve" if word in _YES else "deny" if word in _NO else None


def is_unclear(text: str) -> bool:
    """True for a text that seems to decide but does not do so clearly: "yes please", "👍"."""
    words = _words(text)
    if not words or len(words) > _UNCLEAR_BEGINNING or decision_in(text):
        return False
    plain = ["".join(filter(str.isalnum, word)) for word in words]
    if len(words) > _UNCLEAR_WORDS:
        return plain[0] in _YES | _NO
    return not any(plain) or any(word in _YES | _NO for word in plain)


def _words(text: str) -> list[str]:
    text = _COMMAND.sub(r"\1", _INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))
    return _PUNCTUATION.sub(" ", _MENTION.sub(" ", text)).casefold().split()


async def settle(tx: Tx, run_id: UUID, step: int, decision: Decision, by: str, content: bytes | None = None) -> None:
    """Records the decision and puts the run at the end of its session's lane. The run's row is locked.

    `content`: of a step that is skipped, sealed. Raises Conflict if the run does not wait for this decision.
    """
    [(session_key,)] = await tx.sql("SELECT session_key FROM run WHERE id = $1", run_id)
    try:
        events = await tx.decide(stream(run_id), Settle(session_key, step, decision, by, content))
    except NotWaiting as error:
        raise Conflict(f"run {run_id}: {error}") from error
    if not events:
        raise Conflict(f"run {run_id} is over")
    item_id = derived_id(run_id, "item", events[0].n)
    await projections.resumed(tx, run_id, item_id)
    queue_run(tx, run_id, session_key, item_id=item_id)


async def suspension(tx: Tx, run_id: UUID) -> Suspension:
    """The decision that the run waits for; locks the run's row. Raises NotFound, Conflict if it waits for none."""
    rows = await tx.sql("SELECT status FROM run WHERE id = $1 AND tenant_id = $2 FOR UPDATE", run_id, tx.tenant_id)
    if not rows:
        raise NotFound(f"run {run_id}")
    waits = (await tx.load(stream(run_id))).suspended
    if waits is None:
        raise Conflict(f"the run is {rows[0][0]} and waits for no decision")
    return waits


async def resume_parent(tx: Tx, run_id: UUID) -> None:
    """A run is over: the parent goes on if it waits for this run. Locks the parent's row."""
    rows = await tx.sql(
        """
        SELECT p.id, c.parent_step
        FROM run c JOIN run p ON p.id = c.parent_run_id
        WHERE c.id = $1
        FOR UPDATE OF p
        """,
        run_id,
    )
    for parent_id, step in rows:
        waits = (await tx.load(stream(UUID(str(parent_id))))).suspended
        if waits and (waits.reason, waits.step) == ("agent", step):
            await settle(tx, UUID(str(parent_id)), step, "answer", f"run:{run_id}")
