"""A backup is accepted whole, or refused with one error."""

from __future__ import annotations

import io
import os

import pytest

from infra.security.sealed_stream import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, SealedWriter
from tests.tooling.stack.backup.conftest import KEY, PARTS, written
from tooling.stack.backup import parts
from tooling.stack.backup.parts import BackupReader, BackupWriter, Part, verify
from tooling.stack.engines.base import EngineError

SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES


def refused(backup: bytes, key: bytes = KEY) -> str:
    with pytest.raises(EngineError) as refusal:
        verify(io.BytesIO(backup), key, "x.backup", lambda _: None)
    assert str(refusal.value).startswith("x.backup: the backup ")
    return str(refusal.value)


def test_parts_and_manifest_are_read_as_they_were_written(backup: bytes) -> None:
    reader = BackupReader(io.BytesIO(backup), KEY, "x.backup")
    assert {name: b"".join(pieces) for name, pieces in reader.parts()} == PARTS
    assert reader.manifest
    assert [(part.name, part.size) for part in reader.manifest.parts] == [(n, len(c)) for n, c in PARTS.items()]


def test_a_part_that_is_not_read_is_verified_nevertheless(backup: bytes) -> None:
    sizes: list[int] = []
    manifest, keys = verify(io.BytesIO(backup), KEY, "x.backup", sizes.append)
    assert keys == PARTS["keys"]
    assert sum(sizes) == sum(len(content) for content in PARTS.values())
    reader = BackupReader(io.BytesIO(backup), KEY, "x.backup")
    assert len(list(reader.parts())) == len(PARTS)
    assert reader.manifest == manifest


def test_a_changed_byte_of_any_chunk_is_refused(backup: bytes) -> None:
    for place in [0, 8, 9, 20, *range(HEADER_BYTES, len(backup), SEALED_CHUNK // 3), len(backup) - 1]:
        changed = bytearray(backup)
        changed[place] ^= 0x40
        refused(bytes(changed))


def test_a_backup_that_was_cut_off_is_refused(backup: bytes) -> None:
    borders = range(HEADER_BYTES, len(backup), SEALED_CHUNK)
    for length in [0, 5, *borders, *(border + 1 for border in borders), len(backup) - 1]:
        refused(backup[:length])


def test_another_key_is_refused(backup: bytes) -> None:
    assert "sealed under the key" in refused(backup, os.urandom(32))


def test_a_newer_format_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr(parts, "FORMAT", parts.FORMAT + 1)
        backup = written(PARTS, format_=parts.FORMAT)
    assert "has version 3 of the format, and this code reads 2: use newer code" in refused(backup)


def test_a_manifest_of_other_parts_is_refused() -> None:
    assert "not those of its manifest" in refused(written(PARTS, parts=[Part("database", 1, "0")]))


def test_a_stream_without_a_manifest_is_refused() -> None:
    file = io.BytesIO()
    writer = SealedWriter(file, KEY)
    writer.write(b"F\x00\x00\x00\x011")
    writer.close()
    assert "ends before its manifest" in refused(file.getvalue())


def test_frames_after_the_manifest_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    close = SealedWriter.close

    def with_more(writer: SealedWriter) -> None:
        writer.write(b"E\x00\x00\x00\x00")
        close(writer)

    monkeypatch.setattr(SealedWriter, "close", with_more)
    assert "goes on after its manifest" in refused(written(PARTS))


@pytest.mark.parametrize("kinds", [b"B", b"E", b"PP", b"PM", b"PEB"])
def test_frames_in_a_wrong_order_are_refused(kinds: bytes) -> None:
    file = io.BytesIO()
    writer = BackupWriter(file, KEY)
    for kind in kinds:
        writer._frame(bytes([kind]), b"x")
    writer._sealed.close()
    assert "wrong order" in refused(file.getvalue())
