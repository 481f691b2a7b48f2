"""Removes the thoughts of a model from the text of its answer.

A server that does not know the model's format passes its thoughts on as text between tags: at the start of an answer,
and with some chat templates without the tag that opens them.
"""

from __future__ import annotations

import re

# The number of characters that are held back at the start of an answer, because its thoughts may end without a tag
# that opened them.
HELD = 80

# The tag that opens thoughts → the tag that ends them, in lower case; both are found in any case.
_NAMES = ("think", "thinking", "antthinking", "thought", "reasoning", "reflection", "scratchpad", "seed:think")
_ENDS = {
    **{f"<{name}>": f"</{name}>" for name in _NAMES},
    # Mistral's Magistral, Kimi-VL, Cohere's Command A, gpt-oss.
    "[think]": "[/think]",
    "◁think▷": "◁/think▷",
    "<|start_thinking|>": "<|end_thinking|>",
    "<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>analysis<|message|>": "<|channel|>final<|message|>",
    # Gemma 4, Open Thoughts.
    "<|channel>thought": "<channel|>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
_TAGS = f"({'|'.join(map(re.escape, _ENDS))})"
_TAG, _OPENING = re.compile(_TAGS, re.IGNORECASE), re.compile(rf"\s*{_TAGS}", re.IGNORECASE)
# A closing tag ends thoughts if it does not stand in a sentence about tags.
_CLOSING = re.compile(rf"(?<![ \t`'\"(\[>])</({'|'.join(_NAMES)})>", re.IGNORECASE)
_LONGEST_TAG = max(map(len, _ENDS.values()))
# Of the white space before an answer, more than this is dropped: it would be looked at again for each piece.
_MOST_BLANK = 200


class Thoughts:
    """Removes thoughts between tags from the start of an answer.

    `held`: how many characters may wait for a closing tag without an opening one; None: all of the answer.
    """

    def __init__(self, held: int | None) -> None:
        self._held = held
        self._waiting: list[str] = []
        """A held beginning that has no tag. Its end is in the buffer: it may be the beginning of a tag."""
        self._buffer = ""
        self._end: re.Pattern[str] | None = None
        """The tag that ends the thoughts that are being read."""
        self._decided = False
        self._after_thoughts = False
        self._is_nested = False
        """The thoughts have opening tags within, so they may go on after the first closing one."""
        self._shown = ""
        """The end of the shown text."""
        self.ended_without_beginning = False

    def feed(self, text: str) -> str:
        """The part of the text that is known to be the answer."""
        if self._decided:
            return self._show(text)
        self._buffer += text
        return self._advance(is_last=False)

    def flush(self) -> str:
        """The held part, when no more text follows."""
        return "" if self._decided else self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        while True:
            if self._end:
                end = self._end.search(self._buffer)
                self._is_nested = self._is_nested or bool(_TAG.search(self._buffer[: end.start() if end else None]))
                if not end:
                    # Only the tail may hold a part of the tag.
                    self._buffer = self._buffer[-_LONGEST_TAG:]
                    return ""
                self._end, self._buffer, self._after_thoughts = None, self._buffer[end.end() :], True
            if self._after_thoughts:
                self._buffer = self._buffer.lstrip()
            elif len(self._buffer) > _MOST_BLANK and self._buffer.isspace():
                self._buffer = self._buffer[-_MOST_BLANK:]
            if not self._waiting and (opening := _OPENING.match(self._buffer)):
                self._end = re.compile(re.escape(_ENDS[opening[1].lower()]), re.IGNORECASE)
                self._buffer = self._buffer[opening.end() :]
                continue
            start = self._buffer[: _MOST_BLANK + _LONGEST_TAG].lstrip().lower()
            if not is_last and not self._waiting and any(tag.startswith(start) for tag in _ENDS):
                return ""
            if self._held != 0 and (self._is_nested or not self._after_thoughts):
                if closing := _CLOSING.search(self._buffer):
                    before = "".join((*self._waiting, self._buffer[: closing.start()]))
                    if not self._after_thoughts and (opening := _TAG.search(before)):
                        # The answer began before the thoughts. Within a line, it speaks of tags.
                        are_thoughts = before[: opening.start()].endswith("\n")
                        rest = self._buffer[(closing.end() if are_thoughts else closing.start()) :]
                        self._decided = self._after_thoughts = True
                        return self._show(before[: opening.start() if are_thoughts else None] + rest)
                    self.ended_without_beginning = self.ended_without_beginning or not self._after_thoughts
                    self._after_thoughts = True
                    self._buffer = self._buffer[closing.end() :]
                    self._waiting.clear()
                    continue
                if not is_last and (self._held is None or self._is_nested or len(self._buffer) < self._held):
                    if len(self._buffer) > 2 * HELD:
                        # One sign more than a tag: it decides whether the tag stands in a sentence.
                        self._waiting.append(self._buffer[: -_LONGEST_TAG - 1])
                        self._buffer = self._buffer[-_LONGEST_TAG - 1 :]
                    return ""
            self._decided = True
            buffer, self._buffer = "".join((*self._waiting, self._buffer)), ""
            return self._show(buffer)

    def _show(self, text: str) -> str:
        if self._held != 0 and not self._after_thoughts and not self.ended_without_beginning:
            self._shown += text
            if _CLOSING.search(self._shown):
                # Too late for this stream; the next answers of this model are held back.
                self.ended_without_beginning = True
            self._shown = self._shown[-_LONGEST_TAG - 1 :]
        return text


def without_thoughts(text: str) -> str:
    """A whole answer without the thoughts that its stream has shown before their closing tag came."""
    if _TAG.search(text) is None and (closing := _CLOSING.search(text)):
        return text[closing.end() :].lstrip()
    return text
