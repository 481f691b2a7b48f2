"""Inserts items at the end of lanes, in the transaction that asks for the work. `infra.lanes` processes them.

If the process has a place for the lane of a new item, and the lane has nothing else to do, the transaction also claims
the lane. The item is then handled right after the commit, without a wake-up and a search for ready lanes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol, TypeVar
from uuid import UUID

import msgspec

AT_ONCE = timedelta()

Item = TypeVar("Item", bound=msgspec.Struct)
ItemOf = TypeVar("ItemOf", bound=msgspec.Struct, covariant=True)


class LaneKind(Protocol[ItemOf]):
    """The part of `infra.lanes.lane.Lane` that a transaction needs."""

    @property
    def name(self) -> str: ...

    @property
    def item(self) -> type[ItemOf]: ...


class NewItem(NamedTuple):
    """An item to be enqueued. `body` and `headers` are JSON."""

    kind: str
    tenant_id: str
    lane: str
    item_id: UUID
    body: bytes
    headers: str
    after: timedelta = AT_ONCE
    expires_in: timedelta | None = None


class ClaimedItem(NamedTuple):
    """A new item that is the first of its lane, which this process has claimed together with the insert."""

    item: NewItem
    lane_id: int
    epoch: int
    seq: int
    until: float
    """The claim runs out at this time of the monotonic clock, or later."""


class Places(Protocol):
    """The lane runner of this process: it has places for lanes, which a transaction can claim for it."""

    owner: UUID
    lease_seconds: float

    def reserve(self, kind: str, tenant_id: str) -> bool:
        """Keeps a place for one lane of the tenant, until `take` or `give_up`. False if there is none."""

    def give_up(self, kind: str, tenant_id: str) -> None:
        """The place is not needed."""

    def take(self, claimed: ClaimedItem) -> None:
        """The claim is committed: the item is handled now."""


_TYPES = ("text", "text", "text", "uuid", "bytea", "text", "interval", "interval", "boolean")


def enqueue_call(after: int) -> str:
    """The call of `enqueue_items`, which locks the lanes, with parameters behind the first `after`."""
    columns = [f"${n}::{type_}[]" for n, type_ in enumerate(_TYPES, after + 1)]
    # Only the database's clock decides when an item is due: those of the machines may differ.
    pauses = f"unnest({columns[6]}) WITH ORDINALITY AS p(pause, n)"
    columns[6] = f"(SELECT array_agg(clock_timestamp() + pause ORDER BY n) FROM {pauses})"
    return f"enqueue_items({', '.join(columns)}, ${after + 10}::uuid, ${after + 11}::float8)"


class NewItems:
    """The items of one transaction, and the places that are reserved for their lanes."""

    def __init__(self, places: Places | None) -> None:
        self._places = places
        self._items: dict[tuple[str, UUID], NewItem] = {}
        self._inserting: Sequence[NewItem] = ()
        self._until = 0.0
        self._reserved: list[NewItem] = []
        self._claimed: dict[tuple[str, UUID], ClaimedItem] = {}

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, item: NewItem) -> None:
        """Does nothing for an id that the kind has here already."""
        self._items.setdefault((item.kind, item.item_id), item)

    def arguments(self) -> list[Any]:
        """The arguments of `enqueue_call` for the items, in their order. Places are reserved for their lanes.

        An item whose id exists already is skipped. The lanes' rows are locked until the transaction ends: an item that
        commits later stands behind.
        """
        items = self._inserting = list(self._items.values())
        self._items.clear()
        reserved = [self._reserve(item) for item in items]
        self._until = time.monotonic() + (self._places.lease_seconds if self._places else 0.0)
        return [
            [item.kind for item in items],
            [item.tenant_id for item in items],
            [item.lane for item in items],
            [item.item_id for item in items],
            [item.body for item in items],
            [item.headers for item in items],
            [item.after for item in items],
            [item.expires_in for item in items],
            reserved,
            self._places.owner if self._places else None,
            self._places.lease_seconds if self._places else None,
        ]

    def inserted(self, rows: Sequence[tuple[int | None, int, int, int]]) -> set[str]:
        """Takes the rows that `enqueue_items` has returned; those that begin with None are not from it.

        Returns the kinds of lane in which there is something to claim.
        """
        items = self._inserting
        for n, lane_id, epoch, seq in rows:
            if n is not None:
                item = items[n - 1]
                self._claimed[item.kind, item.item_id] = ClaimedItem(item, lane_id, epoch, seq, self._until)
        return {item.kind for item in items if not self.is_claimed(item.kind, item.item_id)}

    def is_claimed(self, kind: str, item_id: UUID) -> bool:
        """The transaction has claimed a lane with this item."""
        return (kind, item_id) in self._claimed

    def _reserve(self, item: NewItem) -> bool:
        if self._places is None or item.after:
            return False
        if not self._places.reserve(item.kind, item.tenant_id):
            return False
        self._reserved.append(item)
        return True

    def ended(self, *, committed: bool) -> None:
        """The transaction has ended: its claims are handed over, and all other places are given up."""
        claimed = self._claimed if committed else {}
        for item in self._reserved:
            if (item.kind, item.item_id) not in claimed:
                assert self._places
                self._places.give_up(item.kind, item.tenant_id)
        for one in claimed.values():
            assert self._places
            self._places.take(one)
