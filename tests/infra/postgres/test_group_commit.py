"""The group-commit primitive: which writes share a group, and how each one ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from infra.errors import describe
from infra.postgres.group_commit import GroupCommit


class Store:
    """Records the groups that were committed. A write below 0 fails with its group, 0 is left out."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.attempts = 0

    async def commit(self, group: Sequence[int]) -> Mapping[int, Exception]:
        self.attempts += 1
        await asyncio.sleep(0)
        if error := next((write for write in group if write < 0), 0):
            raise ConnectionResetError("away") if error == -2 else ValueError(error)
        self.groups.append([write for write in group if write])
        return {index: KeyError(write) for index, write in enumerate(group) if not write}


async def ends(store: Store, *writes: int, largest: int = 100) -> list[str]:
    commits = GroupCommit(store.commit, largest=largest)
    results = await asyncio.gather(*map(commits.write, writes), return_exceptions=True)
    assert (commits.working, commits.uncommitted) == (None, 0)
    return ["stored" if result is None else describe(result) for result in results]


async def test_writes_that_wait_together_share_a_group() -> None:
    store = Store()
    assert await ends(store, 1, 2, 3, 4, 5, largest=3) == ["stored"] * 5
    assert store.groups == [[1, 2, 3], [4, 5]]


async def test_a_write_that_fails_takes_no_other_with_it() -> None:
    store = Store()
    assert await ends(store, 1, -1, 2, 0) == ["stored", "ValueError: -1", "stored", "KeyError: 0"]
    assert store.groups == [[1], [2], []]


async def test_a_transient_error_ends_the_whole_group_after_one_attempt() -> None:
    store = Store()
    assert await ends(store, 1, -2, 3) == ["ConnectionResetError: away"] * 3
    assert store.attempts == 1


async def test_the_write_of_a_cancelled_caller_is_committed_and_the_next_group_goes_on() -> None:
    store = Store()
    commits = GroupCommit(store.commit, largest=1)
    one, two = (asyncio.create_task(commits.write(write)) for write in (1, 2))
    await asyncio.sleep(0)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    await two
    assert store.groups == [[1], [2]]
