"""Ids and time."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from uuid import UUID

from uuid_utils import compat

from infra.clock import utcnow, uuid7


def test_ids_are_version_7_of_the_standard_library_and_tell_their_time() -> None:
    id_ = uuid7()
    assert type(id_) is UUID
    assert id_.version == 7
    time = datetime.fromtimestamp((id_.int >> 80) / 1000, UTC)
    assert abs(time - utcnow()) < timedelta(minutes=1)


def test_ids_never_repeat_even_when_the_clock_stands_still_or_jumps_back() -> None:
    now = 1_800_000_000_000_000_000
    ids = [compat.uuid7(nanoseconds=now - jump * 1_000_000) for jump in (0, 500, 0, 1) for _ in range(10_000)]
    assert len(set(ids)) == len(ids)


def test_a_forked_process_makes_other_ids() -> None:
    uuid7()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, b"".join(uuid7().bytes for _ in range(100)))
        os._exit(0)
    ours = {uuid7().bytes for _ in range(100)}
    os.waitpid(pid, 0)
    theirs = os.read(read, 1600)
    os.close(read)
    os.close(write)
    assert ours.isdisjoint(theirs[n : n + 16] for n in range(0, 1600, 16))
    # The time part may differ by chance; the random part must differ by itself.
    assert {id_[8:] for id_ in ours}.isdisjoint(theirs[n + 8 : n + 16] for n in range(0, 1600, 16))
