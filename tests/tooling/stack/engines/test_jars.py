from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tooling.stack.engines import jars
from tooling.stack.engines.base import EngineError


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Maven repository in a folder, and a cache of its own."""
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "a.jar").write_bytes(b"jar")
    monkeypatch.setattr("jgo.constants.MAVEN_CENTRAL_URL", repository.as_uri())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jars, "_HERE", tmp_path)
    return repository


def pin(tmp_path: Path, path: str, content: bytes) -> None:
    (tmp_path / "thing.jars").write_text(f"{path} {hashlib.sha256(content).hexdigest()}\n")


def test_pinned_files_are_downloaded_once(repository: Path, tmp_path: Path) -> None:
    pin(tmp_path, "a.jar", b"jar")
    folder = jars.install_jars("thing")
    assert (folder / "a.jar").read_bytes() == b"jar"
    (repository / "a.jar").unlink()
    assert jars.install_jars("thing") == folder


def test_another_file_than_the_pinned_one_is_refused_and_not_kept(repository: Path, tmp_path: Path) -> None:
    pin(tmp_path, "a.jar", b"what it was")
    with pytest.raises(EngineError, match=r"a\.jar .* differs from the pinned file"):
        jars.install_jars("thing")
    assert list((tmp_path / "clawbus" / "jars").iterdir()) == []


def test_a_file_that_cannot_be_downloaded_is_named(repository: Path, tmp_path: Path) -> None:
    pin(tmp_path, "group/b.jar", b"")
    with pytest.raises(EngineError, match=r"could not download b\.jar"):
        jars.install_jars("thing")
