"""The key of the backups, and the keys of the services in a backup."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tooling.stack.backup import keys
from tooling.stack.backup.keyfile import backup_key, known_key
from tooling.stack.backup.keys import KeyFile
from tooling.stack.engines.base import EngineError
from tooling.stack.keys import forget_masters, make_keys, master_file, new_master


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "elsewhere" / "backup.key"
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(path))
    return path


def test_the_key_is_made_once_and_only_its_owner_can_read_it(key_file: Path) -> None:
    key = backup_key()
    assert backup_key() == known_key() == key
    assert len(key) == 32
    assert key_file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in key_file.parent.iterdir()] == ["backup.key"]


def test_a_restore_makes_no_key(key_file: Path) -> None:
    with pytest.raises(EngineError, match="CLAW_BACKUP_KEY_FILE"):
        known_key()
    assert not key_file.exists()


@pytest.mark.parametrize("content", [b"", b"# only a comment\n", b"c2hvcnQ=\n", b"\xff\xfe"])
def test_a_file_that_is_not_a_key_is_named_and_not_shown(key_file: Path, content: bytes) -> None:
    key_file.parent.mkdir()
    key_file.write_bytes(content)
    with pytest.raises(EngineError, match=r"backup\.key: the key of the backups must be the base64 of 32 bytes"):
        known_key()


def test_a_folder_is_no_key(key_file: Path) -> None:
    key_file.mkdir(parents=True)
    with pytest.raises(EngineError, match=r"backup\.key: cannot be read \(Is a directory\)"):
        known_key()


def test_keys_and_passwords_are_restored_with_their_modes(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for home in (old, new):
        home.mkdir()
    make_keys(old / "keys", ("agent", "billing"))
    (old / "secrets.json").write_text("{}")
    (old / "secrets.json").chmod(0o600)
    (old / "ports.json").write_text("{}")
    (new / "of containers").mkdir()
    found = keys.read(old / "keys", old)
    keys.restore(found, new / "keys", new)
    assert keys.read(new / "keys", new) == found
    keys.restore(found, new / "of containers", None)
    assert keys.read(new / "of containers", None) == [file for file in found if file.path.startswith("keys/")]
    assert {file.path for file in found} >= {"secrets.json", "keys/agent/master.txt", "keys/public/keys.json"}
    assert not (new / "ports.json").exists()
    assert (new / "keys" / "agent" / "private.pem").stat().st_mode & 0o777 == 0o600


def test_a_rotation_during_the_snapshot_loses_no_master_key(tmp_path: Path) -> None:
    make_keys(tmp_path, ("agent",))
    before = keys.read(tmp_path, None)
    old = master_file(tmp_path, "agent").read_text()
    new_master(tmp_path, "agent")
    forget_masters(tmp_path, "agent")
    after = keys.read(tmp_path, None)
    merged = {file.path: file.text for file in keys.merge(before, after)}
    new = master_file(tmp_path, "agent").read_text()
    assert merged["keys/agent/master.txt"].split() == [new, old]
    assert keys.merge(after, after) == after


def test_files_of_services_that_are_new_in_the_snapshot_are_kept() -> None:
    file = KeyFile("keys/agent/master.txt", 0o600, "a")
    assert keys.merge([], [file]) == [file]


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *(
            (path, 0o600)
            for path in ("/etc/passwd", "../x", "keys/../../x", "keys//etc/passwd", "a/b", "", "keys/", "..")
        ),
        *((path, 0o600) for path in ("keys/a\0", "keys/a\n", "keys\\..\\x")),
        *(("keys/a", mode) for mode in (0o4755, -1)),
    ],
)
def test_a_backup_has_no_file_outside_of_the_two_folders(path: str, mode: int) -> None:
    content = msgspec.json.encode([{"path": path, "mode": mode, "text": "x"}])
    with pytest.raises(msgspec.ValidationError, match="not one of the keys"):
        msgspec.json.decode(content, type=list[KeyFile])
