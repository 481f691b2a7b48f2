"""The database is recovered to one moment from a base and archived WAL. Damaged WAL is named."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from infra.clock import utcnow
from tooling.stack.backup import database, keys, wal
from tooling.stack.backup.recovery import recovered
from tooling.stack.backup.take import known_archive
from tooling.stack.backup.wal import Archive
from tooling.stack.engines import postgres
from tooling.stack.engines.base import EngineError
from tooling.stack.home import Home
from tooling.stack.keys import forget_masters, make_keys, master_file, new_master
from tooling.testing.stack import Stack, private_home, run_claw


@dataclass
class Archived:
    """A database whose WAL is archived, and a base of it."""

    stack: Stack
    archive: Archive
    base: list[bytes]
    between: datetime
    """The moment between two rows."""
    dropped: datetime
    """The moment before their table was dropped."""
    needed: str
    """The segment of the first of them."""

    @property
    def system(self) -> int:
        return wal.system_of(self.stack.home / "postgres" / "data")

    @property
    def folder(self) -> Path:
        return Path(self.archive.to) / f"wal-{self.system}"


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Stack, Archive]]:
    with private_home() as home:
        folder = home.parent / "archive"
        folder.mkdir()
        folder.chmod(0o777)
        run_claw(home, "up", "--only", "postgres", "--archive", str(folder))
        archive = known_archive(home)
        assert archive
        yield Stack(home), archive


@pytest.fixture(scope="module")
async def archived(running: tuple[Stack, Archive]) -> Archived:
    stack, archive = running
    url = stack.postgres_url
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept (n int)")
    base = list(database.base(url, None))
    await connection.execute("INSERT INTO kept VALUES (1)")
    await database.archive_now(url)
    await connection.execute("INSERT INTO kept VALUES (2)")
    between = await connection.fetchval("SELECT clock_timestamp()")
    needed = await connection.fetchval("SELECT pg_walfile_name(pg_current_wal_insert_lsn())")
    await database.archive_now(url)
    await connection.execute("INSERT INTO kept VALUES (3)")
    dropped = await connection.fetchval("SELECT clock_timestamp()")
    await connection.execute("DROP TABLE kept")
    await database.archive_now(url)
    await connection.close()
    return Archived(stack, archive, base, between, dropped, needed)


@contextmanager
def at(archived: Archived, moment: datetime) -> Iterator[Path]:
    owner = (archived.stack.home / "postgres" / "data").stat().st_uid
    # Beside the state folder: the stack's user may not be able to enter tmp_path.
    folder = archived.stack.home.parent / "recovery"
    with recovered(folder, archived.base, archived.archive, moment, owner) as data:
        yield data
    assert not folder.exists()


def rows(data: Path) -> list[str]:
    """The rows of `kept`, read by the server's program for one user."""
    done = subprocess.run(
        [*_as_owner(data), postgres.BIN / "postgres", "--single", "-D", data, "-j", postgres.DATABASE],
        input="SELECT string_agg(n::text, ',' ORDER BY n) AS found FROM kept\n",
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split('"')[1] for line in done.stdout.splitlines() if "found = " in line]


def _as_owner(data: Path) -> list[str]:
    return ["setpriv", f"--reuid={data.stat().st_uid}", "--clear-groups"] if os.geteuid() == 0 else []


def test_a_recovery_ends_before_the_mistake(archived: Archived) -> None:
    with at(archived, archived.between) as data:
        assert rows(data) == ["1,2"]
        assert wal.system_of(data) == archived.system


def test_a_later_recovery_follows_the_timeline_of_its_moment(archived: Archived) -> None:
    """Otherwise a second restore would end in the first one's timeline, and undo more than it was asked for."""
    restored = utcnow()
    names = ("00000002.history", f"00000002{archived.needed[8:]}")
    with at(archived, archived.between) as data:
        for name in names:
            wal.push(archived.archive, archived.system, name, (data / "pg_wal" / name).read_bytes())
    try:
        with at(archived, archived.dropped) as data:
            assert rows(data) == ["1,2,3"]
        # Segments of another timeline are not behind the end of this one.
        with pytest.raises(EngineError, match="the archive ends before the segment 00000001"), at(archived, restored):
            pass
    finally:
        for name in names:
            (archived.folder / name).unlink()


def test_damaged_wal_is_named(archived: Archived) -> None:
    *_, first, second, _ = wal.segments(archived.archive, archived.system)
    file = archived.folder / second
    whole = file.read_bytes()
    for damaged, reason in (
        (whole[:-1], "the file was changed or cut off after byte"),
        (whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], "the file was changed or cut off after byte"),
        (b"", "the file is not a sealed stream"),
        ((archived.folder / first).read_bytes(), f"is {first} of the database {archived.system}"),
    ):
        file.write_bytes(damaged)
        try:
            with pytest.raises(EngineError, match=f"{file}: {reason}"):
                wal.pull(archived.archive, archived.system, second)
        finally:
            file.write_bytes(whole)


@pytest.mark.timeout(600)
def test_a_recovery_stops_at_damaged_or_missing_wal(archived: Archived) -> None:
    """Otherwise it would end there as if the archive did, with an earlier state than was asked for."""
    name = archived.needed
    file, away = archived.folder / name, archived.folder.parent / "away"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        with (
            pytest.raises(EngineError, match=f"{file}: the file was changed or cut off"),
            at(archived, archived.between),
        ):
            pass
    finally:
        file.write_bytes(whole)
    file.rename(away)
    try:
        reason = f"the segment {name} of the WAL is missing, and later ones are there"
        with pytest.raises(EngineError, match=reason), at(archived, archived.between):
            pass
    finally:
        away.rename(file)


def test_an_archive_of_another_database_or_key_is_refused(archived: Archived, tmp_path: Path) -> None:
    name = wal.segments(archived.archive, archived.system)[-1]
    other = Archive(str(tmp_path), archived.archive.secret, {})
    (tmp_path / "wal-7").mkdir()
    (tmp_path / "wal-7" / name).write_bytes((archived.folder / name).read_bytes())
    with pytest.raises(EngineError, match=f"is {name} of the database {archived.system}"):
        wal.pull(other, 7, name)
    with pytest.raises(EngineError, match="was sealed under the key"):
        wal.pull(Archive(archived.archive.to, "another", {}), archived.system, name)


def test_a_moment_that_the_archive_does_not_reach_is_refused(archived: Archived) -> None:
    with (
        pytest.raises(EngineError, match="the archive ends before the segment"),
        at(archived, utcnow() + timedelta(hours=1)),
    ):
        pass


def test_any_error_of_the_archive_ends_a_recovery(archived: Archived, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the server would wait for its file forever."""

    def fails(*_: object) -> None:
        raise RuntimeError("the store gave an answer that it never gives")

    monkeypatch.setattr(wal, "pull", fails)
    with pytest.raises(EngineError, match="the store gave an answer"), at(archived, archived.between):
        pass


def test_no_file_is_overwritten_and_a_repeat_is_accepted(archived: Archived) -> None:
    archive, system = archived.archive, archived.system
    name = wal.segments(archive, system)[-1]
    content = wal.pull(archive, system, name)
    assert content is not None
    before = (archived.folder / name).read_bytes()
    wal.push(archive, system, name, content)
    with pytest.raises(EngineError, match="exists with another content and is not overwritten"):
        wal.push(archive, system, name, content[:-1] + b"x")
    assert (archived.folder / name).read_bytes() == before


async def test_an_archive_that_fails_loses_nothing_and_is_a_problem(
    archived: Archived, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL keeps segments that cannot be archived, so the status tells before the disk is full."""
    monkeypatch.setattr(postgres, "_LATE_SECONDS", 0)
    place, url = Home(archived.stack.home).place(), archived.stack.postgres_url
    assert await postgres.problem(place) is None
    connection = await asyncpg.connect(url)
    name = await connection.fetchval("SELECT pg_walfile_name(pg_current_wal_lsn())")
    # Another database's file, as if two had the same place.
    other = archived.folder / name
    other.write_bytes(b"of another")
    await connection.execute("CREATE TABLE more (n int)")
    await connection.fetchval("SELECT pg_switch_wal()")
    while not await connection.fetchval("SELECT last_failed_wal = $1 FROM pg_stat_archiver, pg_sleep(0.2)", name):
        pass
    problem = await postgres.problem(place)
    assert problem
    assert problem.startswith("1 segments of WAL wait for their archive")
    assert other.read_bytes() == b"of another"
    log = (archived.stack.home / "log" / "postgres.log").read_text()
    assert f"{other}: the file is not a sealed stream" in log
    other.unlink()
    await database.archive_now(url)
    await connection.close()
    assert await postgres.problem(place) is None
    assert wal.pull(archived.archive, archived.system, name)


def test_segments_are_sealed(archived: Archived) -> None:
    """The first bytes of a segment are its magic number; the archive has none of its words."""
    for name in wal.segments(archived.archive, archived.system):
        assert (archived.folder / name).read_bytes().startswith(b"CLAWSEAL")
        assert (archived.folder / name).stat().st_mode & 0o077 == 0


def test_the_keys_of_every_time_are_in_the_archive(tmp_path: Path) -> None:
    """Rows that were sealed after the backup need keys that the backup does not have."""
    archive = Archive(str(tmp_path / "archive"), "secret", {})
    home = tmp_path / "home"
    make_keys(home / "keys", ("agent",))
    first = keys.read(home / "keys", home)
    wal.push_keys(archive, 7, home)
    masters = [master_file(home / "keys", "agent").read_text()]
    for _ in range(2):
        new_master(home / "keys", "agent")
        forget_masters(home / "keys", "agent")
        masters.append(master_file(home / "keys", "agent").read_text())
        wal.push_keys(archive, 7, home)
        wal.push_keys(archive, 7, home)
    found = {file.path: file.text for file in wal.key_files(archive, 7, first)}
    assert found["keys/agent/master.txt"].split() == masters[::-1]
    assert len(archive.of(7).stored()) == 3


def test_old_wal_is_removed_and_keys_and_histories_stay(tmp_path: Path) -> None:
    archive = Archive(str(tmp_path / "archive"), "secret", {})
    names = ("000000010000000000000001", "000000010000000000000002", "00000002.history")
    for name in names:
        wal.push(archive, 7, name, b"content")
    wal.push_keys(archive, 7, tmp_path)
    old = utcnow() - timedelta(days=31)
    for path in (tmp_path / "archive" / "wal-7").iterdir():
        if path.name != names[1]:
            os.utime(path, (old.timestamp(), old.timestamp()))
    assert wal.prune(archive, 7, utcnow() - timedelta(days=30)) == 1
    left = archive.of(7).stored()
    assert names[0] not in left
    assert {names[1], names[2]} < left.keys()
    assert len(left) == 3


def test_the_timeline_of_a_moment_is_the_newest_that_had_begun(tmp_path: Path) -> None:
    archive, now = Archive(str(tmp_path / "archive"), "secret", {}), utcnow()
    wal.push(archive, 7, "000000030000000000000001", b"content")
    for name, hours in (("00000002.history", 3), ("0000000B.history", 1)):
        wal.push(archive, 7, name, b"content")
        began = (now - timedelta(hours=hours)).timestamp()
        os.utime(tmp_path / "archive" / "wal-7" / name, (began, began))
    moments = [now - timedelta(hours=hours) for hours in (4, 2, 0)]
    assert [wal.timeline(archive, 7, moment) for moment in moments] == ["current", "2", "11"]


@pytest.mark.parametrize("name", ["000000010000000000000009", "00000002.history"])
def test_a_file_that_is_not_in_the_archive_is_none(tmp_path: Path, name: str) -> None:
    assert wal.pull(Archive(str(tmp_path), "secret", {}), 7, name) is None
