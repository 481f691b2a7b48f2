from __future__ import annotations

from pathlib import Path

import pytest

from tooling.stack.engines.base import complete


def test_of_two_processes_that_make_a_folder_the_first_one_wins(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        complete(tmp_path / name, tmp_path / "folder")
    assert (tmp_path / "folder" / "file").read_text() == "first"


def test_a_folder_that_cannot_be_renamed_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fresh").mkdir()
    with pytest.raises(OSError, match="No such file"):
        complete(tmp_path / "fresh", tmp_path / "missing" / "folder")
