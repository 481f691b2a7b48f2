"""Who may read a document: its audience, and the names under which a caller is known. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from infra.errors import InvalidMessage
from infra.security.auth import Identity
from services.memory.metering.usage import UNKNOWN, UseSource, of_client

ALL = "all"
MAX_NAMES = 100
MAX_TAG = 100
_NAME = re.compile(r"(agent|member|group):[^\s,]{1,100}")


class ReaderNames(NamedTuple):
    """The tenant and the names of the agent, member or key that reads."""

    tenant_id: str
    names: tuple[str, ...]
    subject_id: str = ""
    """The person whose memories it may read."""
    agent_id: str = ""
    origin: UseSource = UNKNOWN
    """Pays for the search."""


class Filters(NamedTuple):
    """The documents that a search looks at. None: all of them."""

    document_ids: tuple[UUID, ...] | None = None
    tags: tuple[str, ...] | None = None
    """A document must have all of them."""
    since: datetime | None = None
    """A document must have been uploaded then or later."""


NO_FILTERS = Filters()


class Owners(NamedTuple):
    """The documents whose rows in the index a search looks at."""

    only: tuple[UUID, ...] | None = None
    """None: all."""
    without: tuple[UUID, ...] = ()


EVERY = Owners()


def of_identity(who: Identity) -> ReaderNames:
    names = (ALL, who.actor, *(f"group:{name}" for name in sorted(who.groups)))
    return ReaderNames(who.tenant_id, names, who.actor, origin=of_client(who.actor))


def view_names(who: Identity) -> tuple[str, ...] | None:
    """The names under which the client sees documents in lists and views; None if it sees all of them. A client also
    sees the documents that it uploaded. A search goes by the audience alone."""
    return None if "admin" in who.scopes else of_identity(who).names


def of_agent(tenant_id: str, agent_id: str, subject_id: str = "", origin: UseSource = UNKNOWN) -> ReaderNames:
    """`agent_id` may be empty: then only documents for all are read. `subject_id`: the person to whom it talks."""
    return ReaderNames(tenant_id, (ALL, f"agent:{agent_id}") if agent_id else (ALL,), subject_id, agent_id, origin)


def checked_audience(names: Sequence[str]) -> list[str]:
    """The names in order, without repeats. Raises InvalidMessage naming the wrong one."""
    for n, name in enumerate(names):
        if name != ALL and not _NAME.fullmatch(name):
            raise InvalidMessage(f"audience[{n}]", "must be all, agent:<id>, member:<id> or group:<name>")
    if not 1 <= len(names) <= MAX_NAMES:
        raise InvalidMessage("audience", f"must have 1 to {MAX_NAMES} names")
    return _ordered(names)


def checked_tags(tags: Sequence[str], field: str = "tags") -> list[str]:
    """The tags in order, without repeats. Raises InvalidMessage naming the wrong one."""
    for n, tag in enumerate(tags):
        if not 1 <= len(tag) <= MAX_TAG or not tag.isprintable() or tag != tag.strip():
            raise InvalidMessage(f"{field}[{n}]", f"must have 1 to {MAX_TAG} visible characters")
    if len(tags) > MAX_NAMES:
        raise InvalidMessage(field, f"must have at most {MAX_NAMES} tags")
    return _ordered(tags)


def _ordered(texts: Iterable[str]) -> list[str]:
    return sorted(set(texts))
