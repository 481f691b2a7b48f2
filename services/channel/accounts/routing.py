"""Which agent of a channel gets a message, and which messages of a group are for the bot. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from uuid import UUID

import msgspec

from services.channel.vendors.base import Groups
from services.channel.vendors.items import Inbound

# In a group, some vendors leave the mention of the bot in the text, as ``@name`` or as ``<@id>``. A name ends with
# another sign than a space: otherwise each part of many spaces could be its end.
_MENTION = re.compile(r"\s*(?:<@[^<>\n]{1,100}>\s*|@[^/@\n]{0,99}[^/@\s]\s+)(?=[/@])")
# ``/name`` or ``@name`` at the beginning; Telegram adds the bot's name to a command.
_COMMAND = re.compile(r"\s*[/@]([A-Za-z0-9_-]{1,32})(?:@\w+)?(?:[\s,:，：]+|$)")


class Route(msgspec.Struct, frozen=True):
    """Messages for an agent of their own. Of several routes the first that fits counts."""

    agent_id: UUID
    conversation_id: str = ""
    """The vendor's id of a conversation, with all its threads; empty: any."""
    command: str = ""
    """The message begins with it, after ``/`` or ``@``; empty: any."""


def routed(routes: Sequence[Route], default: UUID, item: Inbound) -> tuple[UUID, str]:
    """The agent for a message, and its text without the command that chose the agent."""
    if not routes:
        return default, item.text
    mention = _MENTION.match(item.text) if item.mentions_bot else None
    starts = (0, mention.end()) if mention else (0,)
    commands = {found[1].lower(): found for start in starts if (found := _COMMAND.match(item.text, start))}
    for route in routes:
        if route.conversation_id not in ("", item.conversation, item.parent):
            continue
        if not route.command:
            return route.agent_id, item.text
        if found := commands.get(route.command.lower()):
            # A command alone is a message, too.
            return route.agent_id, item.text[found.end() :] or item.text
    return default, item.text


def agent_of(routes: Sequence[Route], default: UUID, conversation: str) -> UUID:
    """The agent of a conversation, for a message without a command."""
    return next(
        (route.agent_id for route in routes if route.conversation_id == conversation and not route.command), default
    )


def is_for_the_bot(groups: Groups, item: Inbound) -> bool:
    """False for a message of a group that its channel does not answer. A mention that the vendor does not
    report does not count."""
    if not item.in_group or groups == "all":
        return True
    return item.replies_to_bot or (groups == "mentions" and item.mentions_bot is not False)
