"""The places that keep backups, and the objects of the store in a backup."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from minio import Minio

from infra.clock import utcnow
from infra.stores.objects import list_objects
from tests.tooling.stack.backup.conftest import AT
from tooling.cli import backup
from tooling.cli.backup import _expire
from tooling.stack.backup import objects, take, targets
from tooling.stack.backup.targets import Folder, Target, file_name, made_at, named_store_errors, open_backup, target
from tooling.stack.engines.base import EngineError
from tooling.testing.stack import running_stack

CONTENT = os.urandom(12_000_000)


@pytest.fixture(scope="module")
def access() -> Iterator[dict[str, Any]]:
    with running_stack(("s3",)) as stack:
        yield stack.engines["s3"]


@pytest.fixture(scope="module")
def store(access: dict[str, Any]) -> Minio:
    return objects.client(**access)


@pytest.fixture
def bucket() -> str:
    return f"b-{uuid4().hex}"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, access: dict[str, Any], bucket: str) -> Target:
    return target(str(tmp_path / "new") if request.param == "folder" else f"s3://{bucket}/daily", access)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, access: dict[str, Any]) -> None:
    monkeypatch.setattr(targets, "_PART_BYTES", 5 * 1024 * 1024)
    monkeypatch.setattr(objects, "_UPLOAD_BYTES", 5 * 1024 * 1024)
    monkeypatch.setenv("AWS_ENDPOINT_URL", access["endpoint"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access["access_key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", access["secret_key"])


def put(place: Target, name: str, content: bytes = b"x") -> None:
    with place.new(name) as file:
        for start in range(0, len(content), 700_000):
            file.write(content[start : start + 700_000])


@pytest.mark.parametrize("content", [CONTENT, b"short"])
def test_a_backup_is_read_as_it_was_written(place: Target, content: bytes) -> None:
    put(place, "one", content)
    assert list(place.stored()) == ["one"]
    with open_backup(place.where("one")) as file:
        assert hashlib.sha256(file.read()).digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize("size", [1000, 12_000_000])
def test_a_backup_that_was_not_completed_does_not_appear(place: Target, size: int) -> None:
    put(place, "older")
    with pytest.raises(EngineError, match="pg_dump"), place.new("one") as file:
        file.write(CONTENT[:size])
        raise EngineError("pg_dump failed")
    assert list(place.stored()) == ["older"]


def test_more_files_than_one_page_of_the_store_are_listed(store: Minio, access: dict[str, Any], bucket: str) -> None:
    """An archive of WAL has a segment for each minute."""
    place = target(f"s3://{bucket}/wal", access)
    store.make_bucket(bucket)
    names = [f"{n:024X}" for n in range(1_001)]
    for name in [*names, "other/folder"]:
        store.put_object(bucket, f"wal/{name}", io.BytesIO(b"x"), 1)
    assert sorted(place.stored()) == names


def test_a_folder_overwrites_no_file(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    put(place, "one", b"first")
    with pytest.raises(EngineError, match="one: exists already and is not overwritten"):
        put(place, "one", b"second")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


def test_parts_of_killed_processes_are_no_files_and_the_next_daily_backup_removes_them(tmp_path: Path) -> None:
    place, old, new = Folder(tmp_path), tmp_path / "old.7.unfinished", tmp_path / "new.8.unfinished"
    for part, hours in ((old, 23), (new, 19)):
        part.write_bytes(b"x")
        written = (utcnow() - timedelta(hours=hours)).timestamp()
        os.utime(part, (written, written))
    assert place.stored() == {}
    with place.new("one"):
        # Also if there is no room to finish this one.
        assert not old.exists()
    assert list(place.stored()) == ["one"]
    assert {path.name for path in tmp_path.iterdir()} == {"one", new.name}


def test_a_backup_that_is_ended_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ended(*_: Any) -> None:
        [part] = (tmp_path / "to").iterdir()
        assert part.suffix == ".unfinished"
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(tmp_path / "key"))
    monkeypatch.setattr(take, "source", lambda: SimpleNamespace(s3={}))
    monkeypatch.setattr(backup, "_take", ended)
    default = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            backup.backup(str(tmp_path / "to"))
    finally:
        signal.signal(signal.SIGTERM, default)
    assert list((tmp_path / "to").iterdir()) == []


def test_parts_of_killed_uploads_to_a_bucket_are_removed_after_a_day(
    store: Minio, access: dict[str, Any], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3Proxy names the present moment as the beginning of each upload."""
    store.make_bucket(bucket)
    for name in ("daily/old", "elsewhere"):
        upload = store._create_multipart_upload(bucket, name, {})
        store._upload_part(bucket, name, b"x", {}, upload, 1)

    def parts() -> list[str]:
        return [str(found.object_name) for found in list_objects(store, bucket, ".mpus-")]

    every = parts()
    place = target(f"s3://{bucket}/daily", access)
    put(place, "one")
    assert parts() == every
    monkeypatch.setattr(targets, "_LEFT_SECONDS", -60)
    put(place, "two")
    assert parts() == [part for part in every if "elsewhere" in part]
    assert sorted(place.stored()) == ["one", "two"]


def test_a_file_that_is_missing_is_read_as_none(place: Target) -> None:
    with place.read("one") as file:
        assert file is None
    put(place, "one", b"content")
    with place.read("one") as file:
        assert file
        assert file.read() == b"content"
    assert utcnow() - place.stored()["one"] < timedelta(minutes=5)


def test_a_folder_of_backups_belongs_to_its_owner_only(tmp_path: Path) -> None:
    put(Folder(tmp_path / "new"), "one")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "one").stat().st_mode & 0o777 == 0o600


def test_older_backups_are_removed_and_nothing_else(place: Target) -> None:
    now = utcnow()
    names = [file_name(now - timedelta(days=days)) for days in (40, 31, 29, 0)]
    for name in [*names, "other.backup", "clawbus-20200101T000000Z.backup.old"]:
        put(place, name)
    assert _expire(place, names[-1], 30) == sorted(names[:2])
    assert sorted(place.stored()) == sorted([*names[2:], "other.backup", "clawbus-20200101T000000Z.backup.old"])


def test_the_newest_backup_stays_also_if_the_clock_was_wrong(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    put(place, file_name(AT.replace(year=2000)))
    assert _expire(place, file_name(AT.replace(year=2000)), 1) == []


def test_a_name_tells_the_moment() -> None:
    assert file_name(AT) == "clawbus-20261130T120000Z.backup"
    assert made_at(file_name(AT)) == AT


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/nowhere/x", "is not a file"),
        ("s3:///x", "s3://bucket/prefix"),
        ("s3://My_Bucket/x", "small letters"),
        ("s3://bucket/", "must name the backup"),
    ],
)
def test_a_place_that_cannot_be_read_is_named(where: str, reason: str) -> None:
    with pytest.raises(EngineError, match=reason), open_backup(where):
        pass


def test_an_object_store_without_access_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=f"s3://{bucket}/x: does not exist"), open_backup(f"s3://{bucket}/x"):
        pass
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = pytest.raises(EngineError, match="the object store refused")
    with refused, named_store_errors("s3"), target(f"s3://{bucket}", {}).new("x") as file:
        file.write(b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "storage.example")
    with pytest.raises(EngineError, match=r"AWS_ENDPOINT_URL: 'storage\.example' must be"), open_backup("s3://abc/x"):
        pass
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(EngineError, match="AWS_ACCESS_KEY_ID"), open_backup(f"s3://{bucket}/x"):
        pass


def test_objects_are_restored_with_type_and_metadata(store: Minio, bucket: str) -> None:
    other = f"{bucket}-2"
    store.make_bucket(bucket)
    contents = {"u1/documents/größe 1.txt": CONTENT, "u1/avatars/a.png": b"png", "u2/empty": b""}
    for name, content in contents.items():
        metadata: Any = {"user-id": "u1", "checksum": hashlib.sha256(content).hexdigest()}
        store.put_object(bucket, name, io.BytesIO(content), len(content), "image/png", metadata)
    counted: list[None] = []
    exported = list(objects.export(store, bucket, lambda: counted.append(None)))
    assert max(map(len, exported)) <= 1024 * 1024
    assert objects.restore(store, other, iter(exported)) == len(contents) == len(counted)
    for name, content in contents.items():
        answer = store.get_object(other, name)
        assert answer.data == content
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["x-amz-meta-user-id"] == "u1"
        assert answer.headers["x-amz-meta-checksum"] == hashlib.sha256(content).hexdigest()
        answer.release_conn()


def test_an_object_that_is_deleted_meanwhile_is_left_out(store: Minio, bucket: str) -> None:
    store.make_bucket(bucket)
    for name in ("a", "b", "c"):
        store.put_object(bucket, name, io.BytesIO(b"x"), 1)
    pieces = []
    for piece in objects.export(store, bucket, lambda: None):
        pieces.append(piece)
        store.remove_object(bucket, "b")
    assert objects.restore(store, f"{bucket}-2", iter(pieces)) == 2


def test_a_bucket_that_does_not_exist_is_an_empty_part(store: Minio, bucket: str) -> None:
    assert list(objects.export(store, bucket, lambda: None)) == []
    assert objects.restore(store, bucket, iter([])) == 0
    assert not store.bucket_exists(bucket)


def test_a_part_that_ends_in_an_object_is_refused(store: Minio, bucket: str) -> None:
    store.make_bucket(bucket)
    store.put_object(bucket, "a", io.BytesIO(b"abc"), 3)
    whole = b"".join(objects.export(store, bucket, lambda: None))
    with pytest.raises(EngineError, match="middle of an object"):
        objects.restore(store, f"{bucket}-2", iter([whole[:-1]]))


def test_an_address_of_another_kind_is_no_folder() -> None:
    with pytest.raises(EngineError, match="must be a folder or s3://bucket/prefix"):
        target("ftp://e.example/x", {})


def test_a_backup_leaves_room_for_the_databases_of_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    counted = backup._Counted(file, str(tmp_path / "x.backup"))
    counted.write(b"one")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9 + 2))
    with pytest.raises(EngineError, match=r"x\.backup: would leave less than 1 GB of the disk free"):
        counted.write(b"two")
    assert file.getvalue() == b"one"
    # An object store has no disk here.
    backup._Counted(file, "s3://bucket/x.backup").write(b"three")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    where = str(tmp_path / "file" / "new" / "x.backup")
    refused = pytest.raises(EngineError, match=r"x\.backup: cannot be written \(Not a directory\)")
    with refused, backup._written(where), target(str(tmp_path / "file" / "new"), {}).new("x.backup"):
        pass
