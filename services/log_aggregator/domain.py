"""A chain of audit records: each hash covers the one before it, so a record that is changed or missing shows. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

# What the first record of a chain follows.
GENESIS = bytes(32)


class Link(NamedTuple):
    """A record in its chain. seq: from 1, without gaps. record: its canonical JSON."""

    seq: int
    record: str
    hash: bytes


class Head(NamedTuple):
    """The end of a chain: how many records it has, and the hash of the last."""

    seq: int
    hash: bytes


EMPTY = Head(0, GENESIS)


def canonical(record: Mapping[str, Any]) -> str:
    """JSON that is the same whoever writes it: keys sorted, no spaces, ASCII."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"))


def chained(head: Head, records: Iterable[str]) -> Iterator[Link]:
    """The links that `records` become behind `head`. A hash is SHA-256 of the hash before it and the record's JSON."""
    seq, previous = head
    for record in records:
        seq, previous = seq + 1, hashlib.sha256(previous + record.encode()).digest()
        yield Link(seq, record, previous)


def first_break(head: Head, links: Iterable[Link]) -> int | None:
    """The seq of the first of `links` that does not follow from `head` and those before it."""
    for link in links:
        [expected] = chained(head, [link.record])
        if link != expected:
            return expected.seq
        head = Head(link.seq, link.hash)
    return None
