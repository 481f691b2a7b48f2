"""How messages look after their edits, deletions and reactions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import msgspec

from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Subject, SubjectKeys
from services.channel.events import MessageChange, MessageDeleted, MessageEdited, MessageReacted
from services.channel.publishing import MESSAGE

CHANNEL = """substring(data, position('"channel_id":"' in data) + 14, 36)"""
"""The channel of a `MessageTaken` as bytes: the expression of an index of channels and times."""


@dataclass
class Now:
    """A message as it is now."""

    text: str | None = None
    """The newest text; None if it was not edited, or its author was erased."""
    deleted: bool = False
    signs: dict[str, list[str]] = field(default_factory=dict)
    """Of reactions, by our id of the person."""


async def sizes(tx: Tx, messages: Sequence[UUID]) -> dict[UUID, int]:
    """The bytes of all changes of those `messages` that were changed."""
    names = {MESSAGE.stream(str(id_)).row: id_ for id_ in messages}
    rows = await tx.sql(
        "SELECT stream_id, sum(octet_length(data)) FROM event WHERE stream_id = ANY($1::text[]) GROUP BY stream_id",
        list(names),
    )
    return {names[stream]: size for stream, size in rows}


async def changes(tx: Tx, subjects: SubjectKeys, messages: Sequence[UUID]) -> dict[UUID, Now]:
    """Of those `messages` that were changed."""
    names = {MESSAGE.stream(str(id_)).row: id_ for id_ in messages}
    rows = await tx.sql(
        """
        SELECT stream_id, event_id, type, schema_version, data FROM event
        WHERE stream_id = ANY($1::text[])
        ORDER BY stream_id, version
        """,
        list(names),
    )
    facts: dict[UUID, list[tuple[UUID, MessageChange]]] = {}
    people: set[Subject] = set()
    assert tx.tenant_id
    for stream, event_id, *stored in rows:
        fact = MESSAGE.events.decode(*stored)
        facts.setdefault(names[stream], []).append((event_id, fact))
        if not isinstance(fact, MessageDeleted):
            people.add((tx.tenant_id, fact.subject_id))
    keys = {subject: key for (_, subject), key in (await subjects.keys(tx, people) if people else {}).items()}
    return {id_: _now(of_message, keys) for id_, of_message in facts.items()}


def _now(facts: Sequence[tuple[UUID, MessageChange]], keys: Mapping[str, DataKey | None]) -> Now:
    """Changes may have come in any order. Those of one person are applied in the vendor's."""
    now = Now(deleted=any(isinstance(fact, MessageDeleted) for _, fact in facts))
    ordered = [(id_, fact) for id_, fact in facts if not isinstance(fact, MessageDeleted) and fact.content]
    for id_, fact in sorted(ordered, key=lambda one: one[1].order):
        if (key := keys[fact.subject_id]) is None:
            continue
        content = key.open(fact.content, str(id_), "content")
        match fact:
            case MessageEdited():
                now.text = content
            case MessageReacted():
                signs = now.signs.setdefault(fact.subject_id, [])
                _apply(signs, fact.mode, msgspec.json.decode(content, type=list[str]))
    return now


def _apply(signs: list[str], mode: str, given: Sequence[str]) -> None:
    signs[:] = [] if mode == "all" else [sign for sign in signs if sign not in given]
    if mode != "removed":
        signs += given
