"""Texts about a run that ends without an answer: for the people in a chat, and reasons for the operator."""

from __future__ import annotations

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


def approval_question(tool: str, arguments: str, *, of_asker: bool) -> str:
    """The question in the chat. of_asker: the person who asked may answer it."""
    who = "Please answer" if of_asker else "A person who may decide this has to answer"
    return f"May I use {tool} with {arguments}? {who} yes or no."


def question_repeated(tool: str, arguments: str | None) -> str:
    """The same question after an unclear answer. `arguments`: None if they cannot be read any more."""
    with_arguments = "" if arguments is None else f" with {arguments}"
    return f"I did not understand that. May I use {tool}{with_arguments}? Please answer only yes or no."
