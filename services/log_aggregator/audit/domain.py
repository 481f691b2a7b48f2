"""A chain of audit records. Each hash covers the hash before it, so a changed or missing record is detected. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# The hash before the first record of a chain.
GENESIS = bytes(32)


class Link(NamedTuple):
    """A record in its chain."""

    seq: int
    """From 1, without gaps."""
    record: str
    """Canonical JSON."""
    hash: bytes


class ChainHead(NamedTuple):
    """The end of a chain: the number of its records and the hash of the last one."""

    seq: int
    hash: bytes


EMPTY = ChainHead(0, GENESIS)


def canonical(record: Mapping[str, Any]) -> str:
    """Returns canonical JSON: keys sorted, no spaces, ASCII."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def chained(head: ChainHead, records: Iterable[str]) -> Iterator[Link]:
    """Yields the links of `records` after `head`. A hash is SHA-256 of the previous hash and the record's JSON."""
    seq, previous = head
    for record in records:
        seq, previous = seq + 1, hashlib.sha256(previous + record.encode()).digest()
        yield Link(seq, record, previous)


def first_break(head: ChainHead, links: Iterable[Link]) -> int | None:
    """Returns the seq of the first link that does not follow from `head` and the links before it. None: all follow."""
    for link in links:
        [expected] = chained(head, [link.record])
        if link != expected:
            return expected.seq
        head = ChainHead(link.seq, link.hash)
    return None
