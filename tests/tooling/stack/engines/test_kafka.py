"""The files of Kafka's process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tooling.stack.engines import kafka
from tooling.stack.engines.base import Place, Secrets
from tooling.stack.home import Home


def test_libraries_that_a_killed_process_has_unpacked_are_deleted_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "install_jars", lambda _: tmp_path)
    place = Place(tmp_path, Home(tmp_path).place().ports, Secrets(tmp_path / "secrets.json"))
    (place.folder(kafka.NAME) / "data").mkdir()
    kafka.prepare(place)
    [temporary] = [word for word in kafka.program(place).command if "java.io.tmpdir" in word]
    folder = Path(temporary.partition("=")[2])
    assert folder.is_relative_to(tmp_path)
    (folder / "liblz4-java-1.so").touch()
    kafka.prepare(place)
    assert list(folder.iterdir()) == []
