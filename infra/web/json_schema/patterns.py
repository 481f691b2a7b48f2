"""Patterns of a schema: the work to compile one, and a matcher in time linear in the text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter
from pydantic_core import SchemaError as PatternError

MAX_PATTERN_SIZE = 30_000
"""Of a pattern with its repeats written out, in steps to compile it. A larger pattern is ignored."""
# Steps to compile one occurrence: these classes hold hundreds of ranges.
COMPILE_WEIGHTS = {"w": 350, "W": 350, "p": 250, "P": 250, "b": 20, "B": 20, "d": 30, "D": 30, "s": 10, "S": 10}
_MATCHER_STEPS = 200
"""To make the matcher of the smallest pattern."""
CASELESS = re.compile(r"\(\?[A-Za-z-]*i")
_WIDE = re.compile(rf"[^\x00-\xff]|\\[uUN]|{CASELESS.pattern}")
_REPEAT = re.compile(r"\{ *(\d{0,9}) *(,?) *(\d{0,9}) *\}")
# In this mode a comment could hide a part of the pattern from `pattern_size`.
_VERBOSE = re.compile(r"\(\?[A-Za-z-]*x")


def compile_steps(pattern: str) -> int:
    """Steps to compile a pattern in Python or Rust, without its repeats and escapes. A class beyond Latin-1 becomes a
    table of 65,536 bits in Python, and one without case has each of its characters folded in Rust."""
    class_steps = 1_000 if _WIDE.search(pattern) else 20
    return _MATCHER_STEPS + 6 * len(pattern) + class_steps * pattern.count("[")


def pattern_size(pattern: str, weights: Mapping[str, int]) -> int:
    """The number of parts of a pattern in Rust's syntax, with its repeats written out. `weights`: sizes of escapes."""
    # `sums`: the sizes of the open groups. `last`: the size of the part to which a repeat applies. `depth`: of classes.
    sums, last, at, depth = [0], 0, 0, 0
    while at < len(pattern):
        character = pattern[at]
        at += 1
        size = 1
        if character == "\\" and at < len(pattern):
            size = weights.get(pattern[at], 1)
            at += 1
        elif character == "[":
            depth += 1
            # A bracket directly after the beginning of a class is a member of it.
            at += pattern.startswith("^", at)
            at += pattern.startswith("]", at)
        elif depth:
            depth -= character == "]"
        elif character == "(":
            sums.append(0)
            continue
        elif character == ")" and len(sums) > 1:
            last = sums.pop()
            sums[-1] += last
            continue
        elif character == "{" and (repeat := _REPEAT.match(pattern, at - 1)):
            times = max(int(repeat[1] or 0) + bool(repeat[2]), int(repeat[3] or 0), 1)
            sums[-1] += last * (times - 1)
            last *= times
            at = repeat.end()
            continue
        # A class is one part, with the sizes of its members.
        begins = character == "[" and depth == 1 if depth else character != "]"
        last = size if begins else last + size
        sums[-1] += size
    return sum(sums)


def matcher_of(pattern: str, size: int) -> TypeAdapter[str] | None:
    """pydantic's matcher is Rust's ``regex``, which never backtracks. None if it does not support the pattern."""
    if size > MAX_PATTERN_SIZE or _VERBOSE.search(pattern):
        return None
    try:
        return TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    except PatternError:
        return None
