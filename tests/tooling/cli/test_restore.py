"""`./claw restore` refuses before it changes anything."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.tooling.stack.backup.conftest import KEY, PARTS, written
from tooling.cli.app import build
from tooling.cli.up import up
from tooling.stack.engines.base import EngineError
from tooling.stack.engines.postgres import ARCHIVE
from tooling.stack.home import UNFINISHED


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder that does not exist, and the key of the backups."""
    key = tmp_path / "backup.key"
    key.write_text(base64.b64encode(KEY).decode())
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(key))
    monkeypatch.setenv("CLAW_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def backup(tmp_path: Path) -> Path:
    path = tmp_path / "x.backup"
    path.write_bytes(written(PARTS))
    return path


@pytest.fixture(scope="module")
def claw() -> typer.Typer:
    return build(("restore",))


def restore(claw: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(claw, ["restore", *arguments])


def refused(claw: typer.Typer, *arguments: str) -> str:
    """The text of the error that `main` would print."""
    result = restore(claw, *arguments)
    assert isinstance(result.exception, EngineError), result.output
    return str(result.exception)


def test_a_check_shows_the_parts_and_changes_nothing(claw: typer.Typer, backup: Path, home: Path) -> None:
    result = restore(claw, str(backup), "--check", "--json")
    assert result.exit_code == 0, result.exception
    assert [part["name"] for part in json.loads(result.stdout)["parts"]] == list(PARTS)
    for part in PARTS:
        assert part in restore(claw, str(backup), "--check").stdout
    assert not home.exists()


@pytest.mark.parametrize("damage", ["changed", "cut off", "key", "tables", "no file", "no key"])
@pytest.mark.parametrize("wipe", [(), ("--wipe",)])
def test_a_backup_that_is_not_whole_changes_nothing(
    claw: typer.Typer, backup: Path, home: Path, damage: str, wipe: tuple[str, ...]
) -> None:
    home.mkdir()
    (home / "secrets.json").write_text("{}")
    content = bytearray(backup.read_bytes())
    match damage:
        case "changed":
            content[-5] ^= 1
        case "cut off":
            del content[-1:]
        case "tables":
            content = bytearray(written(PARTS, migrations={"billing": "9001"}))
    backup.write_bytes(content)
    if damage == "key":
        (home.parent / "backup.key").write_text(base64.b64encode(bytes(32)).decode())
    if damage == "no key":
        (home.parent / "backup.key").unlink()
    if damage == "no file":
        backup.unlink()
    error = refused(claw, str(backup), *wipe)
    assert "Nothing was changed" in error or damage in ("no file", "no key")
    assert [path.name for path in home.iterdir()] == ["secrets.json"]


def test_a_stack_with_data_is_refused(claw: typer.Typer, backup: Path, home: Path) -> None:
    """Its database does not run, so it may have tenants."""
    (home / "postgres" / "data").mkdir(parents=True)
    error = refused(claw, str(backup))
    assert error.endswith(
        "this stack has data. Restore into another CLAW_HOME, or delete the data with --wipe. Nothing was changed"
    )
    assert (home / "postgres" / "data").exists()


def test_a_disk_without_room_is_refused_before_the_old_data_is_deleted(
    claw: typer.Typer, backup: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "postgres" / "data").mkdir(parents=True)
    (home / "postgres" / "data" / "table").write_bytes(b"x" * 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    assert refused(claw, str(backup), "--wipe") == (
        f"{home}: the backup needs 0.0 GB or more, and 0.0 GB are free. Nothing was changed"
    )
    assert (home / "postgres" / "data" / "table").stat().st_size == 100_000


def test_the_backup_and_its_key_must_lie_outside_the_folder_that_is_made_empty(
    claw: typer.Typer, backup: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.mkdir()
    inside = backup.rename(home / "x.backup")
    assert f"{inside}: move it out" in refused(claw, str(inside), "--wipe")
    outside = inside.rename(backup)
    key = (home.parent / "backup.key").rename(home / "backup.key")
    monkeypatch.setenv("CLAW_BACKUP_KEY_FILE", str(key))
    assert f"{key}: move it out" in refused(claw, str(outside), "--wipe")
    assert key.exists()


@pytest.mark.parametrize(("tls", "option"), [(True, ["--tls"]), (False, [])])
def test_a_stack_that_used_tls_uses_it_again(
    claw: typer.Typer, backup: Path, monkeypatch: pytest.MonkeyPatch, tls: bool, option: list[str]
) -> None:
    backup.write_bytes(written(PARTS, tls=tls))

    def start(*arguments: str) -> None:
        raise EngineError(" ".join(arguments))

    monkeypatch.setattr("tooling.cli.restore._claw", start)
    assert refused(claw, str(backup)).split() == ["up", "--only", "postgres,s3", *option]


@pytest.mark.parametrize(
    ("at", "archive", "reason"),
    [
        ("yesterday", "/wal", "must have the form 2026-11-30T14:59:59Z"),
        ("2026-11-30T14:59:59", "/wal", "must have a time zone"),
        ("2026-11-30T14:59:59Z", "", "was made without an archive of WAL"),
        ("2026-11-30T11:59:59Z", "/wal", "must be after 2026-11-30T12:00:00"),
        ("2999-01-01T00:00:00Z", "/wal", "not in the future"),
    ],
)
def test_a_moment_that_cannot_be_restored_changes_nothing(
    claw: typer.Typer, backup: Path, home: Path, at: str, archive: str, reason: str
) -> None:
    backup.write_bytes(written(PARTS, archive=archive))
    error = refused(claw, str(backup), "--at", at)
    assert reason in error
    assert error.endswith("Nothing was changed")
    assert not home.exists()


def test_an_archive_in_the_state_folder_is_refused(home: Path) -> None:
    """A restore would delete it."""
    with pytest.raises(EngineError, match="--archive: must be outside"):
        up(archive=str(home / "wal"))
    assert not (home / ARCHIVE).exists()


def test_a_stack_whose_restore_was_interrupted_does_not_start(home: Path) -> None:
    home.mkdir()
    (home / UNFINISHED).touch()
    with pytest.raises(EngineError, match="a restore was interrupted"):
        up()
