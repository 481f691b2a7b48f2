"""Texts about a run that ends without an answer: for the people in a chat, and reasons for the operator."""

from __future__ import annotations

import json
import re

import msgspec

# For the people in a chat. The operator finds the reason on the run.
FAILED = "Sorry, something went wrong and I could not answer. Please try again in a while."
NO_CREDIT = "Sorry, I cannot answer at the moment: the credit for this assistant is used up. Please try again later."
TOO_FAST = "Sorry, this assistant has too much to do at the moment. Please send your message again in a minute."
UNCERTAIN = (
    "Sorry, I could not finish: it is not certain whether a step took effect. An operator has to look at it first."
)
BUSY = "I am still busy with your last message. Please write again when I have answered it."
NOT_YOURS = "Another person has to decide this, so your answer does not count."

# For the operator.
CANCELLED = "cancelled on request"
DELETED = "the person has deleted the message"
INTERRUPTED = "interrupted by a newer message"
TAKEN_OVER = "a person has taken the session over"


# Before a question that is asked again.
UNCLEAR = "I did not understand that."
TOO_EARLY = "You wrote that before I asked."
NEXT = "I also wait for another answer."

# Besides signs that are not printable: the end of a block of code, and letters and marks that no one sees (Unicode's
# Default_Ignorable_Code_Point).
_ESCAPED = re.compile("[`\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")


def approval_question(tool: str, arguments: str, *, of_asker: bool) -> str:
    """The question in the chat. of_asker: the person who asked may answer it."""
    who = "Please answer" if of_asker else "A person who may decide this has to answer"
    return f"{_question(tool, arguments)}{who} yes or no."


def question_repeated(reason: str, tool: str, arguments: str | None) -> str:
    """The same question again. `arguments`: None if they cannot be read any more."""
    if arguments is None:
        return f"{reason} May I use {tool}? Please answer only yes or no."
    return f"{reason} {_question(tool, arguments)}Please answer only yes or no."


def _question(tool: str, arguments: str) -> str:
    return f"May I use {tool} with these arguments?\n\n{_block(arguments)}\n\n"


def _block(arguments: str) -> str:
    """A block of code with the arguments as the tool reads them.

    The model writes them, so a hostile page can: spaces, marks of Markdown, keys that stand twice, or signs that no one
    sees must neither hide a part from the person who decides nor add one.
    """
    try:
        shown = msgspec.json.encode(msgspec.json.decode(arguments)).decode()
    except (msgspec.DecodeError, RecursionError):
        shown = json.dumps(arguments, ensure_ascii=False)
    safe = (sign if sign.isprintable() and not _ESCAPED.match(sign) else _escape(sign) for sign in shown)
    return f"```\n{''.join(safe)}\n```"


def _escape(sign: str) -> str:
    return json.dumps(sign)[1:-1] if ord(sign) > 127 else f"\\u{ord(sign):04x}"
