"""References to items of earlier answers. The AI SDK of Vercel sends them in the place of the items."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec

from infra.errors import NotFound
from infra.security.auth import Identity
from services.ws_gateway.agent import Agent
from services.ws_gateway.openai.conversation import FunctionCall
from services.ws_gateway.openai.fields import check

# Each run that a request refers to costs a call of the agent service.
MAX_RUNS = 100
MAX_CHARACTERS = 4 * 1024 * 1024
"""Of the answers, and of the items that stand for references: a small request may refer to large ones many times."""
SEND_ITEM = (
    "send the item itself (in the AI SDK of Vercel with the provider option store: false, or with provider.chat())"
)
# The ids of `Responses`: the kind of the item, the run, and the step or the number of the call.
_ID = re.compile(r"(msg|fc)_([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})_(\d{1,6})")


class _Answer(msgspec.Struct):
    reply: str
    tool_calls: tuple[FunctionCall, ...] = ()


async def resolved(agent: Agent, who: Identity, items: Sequence[Any]) -> list[Any]:
    """The input of a response with the replies and calls of earlier runs in the place of references to them.

    The last message of a run is its reply; the text before its own tool calls is left out. A reference to anything else
    stays as it is. Raises Failure naming the reference to one run, or to one character, too many, and Transient.
    """
    references = {n: found for n, item in enumerate(items) if (found := _reference(item))}
    runs: dict[str, UUID] = {}
    for n, found in references.items():
        runs[found[2]] = UUID(found[2])
        check(len(runs) <= MAX_RUNS, f"input[{n}].id", f"refers to one answer more than {MAX_RUNS}: {SEND_ITEM}")
    answers: dict[str, _Answer | None] = {}
    size = 0

    def count(n: int, *texts: str) -> None:
        nonlocal size
        size += sum(map(len, texts))
        check(size <= MAX_CHARACTERS, f"input[{n}].id", f"refers to answers of too many characters: {SEND_ITEM}")

    last = {found[2]: n for n, found in references.items() if found[1] == "msg"}
    replaced = list(items)
    for n, found in references.items():
        kind, run, number = found.groups()
        if run not in answers:
            answers[run] = read = await _answer(agent, who, runs[run])
            count(n, *((read.reply, *(call.arguments for call in read.tool_calls)) if read else ()))
        answer = answers[run]
        if answer is None:
            continue
        if kind == "msg":
            replaced[n] = {"role": "assistant", "content": answer.reply if last[run] == n else ""}
        elif int(number) < len(answer.tool_calls):
            call = answer.tool_calls[int(number)]
            count(n, call.arguments)
            replaced[n] = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": call.arguments}
    return replaced


def _reference(item: Any) -> re.Match[str] | None:
    is_reference = isinstance(item, dict) and item.get("type") == "item_reference"
    return _ID.fullmatch(item["id"]) if is_reference and isinstance(item.get("id"), str) else None


async def _answer(agent: Agent, who: Identity, run_id: UUID) -> _Answer | None:
    try:
        facts = await agent.facts(run_id, 0, who)
    except NotFound:
        return None
    completed = [fact.data for fact in facts if fact.event == "run.completed"]
    return msgspec.convert(completed[-1], _Answer) if completed else None
