"""Who may decide about a tool call that waits for approval: names, like the readers of a document. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from infra.security.auth import Identity
from protos.messages.channel import ASKER, CHAT_ADMINS

PATTERN: Final = rf"^({ASKER}|{CHAT_ADMINS}|scope:(run|write|admin)|(person|member|api_key|group):[^\s,]{{1,100}})$"
DEFAULT: Final = (ASKER, "scope:run")


def of_identity(who: Identity) -> tuple[str, ...]:
    """The names of a client of the API."""
    groups = (f"group:{name}" for name in sorted(who.groups))
    return (who.actor, *(f"scope:{scope}" for scope in sorted(who.scopes)), *groups)


def of_person(subject_id: str, *, is_admin: bool) -> tuple[str, ...]:
    """The names of a person in a chat."""
    return (f"person:{subject_id}", CHAT_ADMINS) if is_admin else (f"person:{subject_id}",)


def may_decide(approvers: Sequence[str], names: Sequence[str], *, asked: bool) -> bool:
    """asked: the one with these names is who asked."""
    return not set(approvers).isdisjoint((*names, ASKER) if asked else names)
