"""The lanes of the agent: one per session, in which its runs are executed one after the other."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.lanes.lane import Lane


class RunItem(msgspec.Struct, frozen=True):
    """Execute this run. Its id is that of its first item, too; it has another when a person has let it go on."""

    run_id: UUID


RUNS = Lane("runs", RunItem)
