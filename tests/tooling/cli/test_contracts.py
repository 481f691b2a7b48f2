"""Tests of `claw contracts`: it finds stale, missing and incompatible contracts, and writes compatible ones only."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from tooling.cli import contracts

USAGE = "protos/schemas/billing.v1.UsageRecorded.json"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the contracts, outside of any git repository, on which the command works."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(contracts.ROOT / "protos", tmp_path / "protos", ignore=ignored)
    shutil.copy(contracts.ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(contracts, "ROOT", tmp_path)
    # Otherwise git would find the checkout's repository if the temporary folder is inside the checkout.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    return tmp_path


def add_field(path: Path, name: str) -> None:
    """Adds a field to the schema, as if the struct had had one more field."""
    schema = json.loads(path.read_text(encoding="utf-8"))
    schema["$defs"]["UsageRecorded"]["properties"][name] = {"type": "string", "default": ""}
    path.write_text(json.dumps(schema), encoding="utf-8")


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def problems_of(write: bool, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(typer.Exit) as end:
        contracts.contracts(write)
    assert end.value.exit_code == 1
    return capsys.readouterr().err


def test_the_committed_files_equal_the_generated_ones(capsys: pytest.CaptureFixture[str]) -> None:
    contracts.contracts()
    assert "are current and compatible" in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", ["protos/asyncapi.json", "protos/sample/v1/sample_pb2.pyi", "protos/schemas/grpc.json", USAGE]
)
def test_a_generated_file_that_is_missing_or_differs_is_named_and_written(
    tree: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (tree / path).read_text(encoding="utf-8")
    (tree / path).write_text(good + "\n", encoding="utf-8")
    assert f"{path}: differs from the generated file" in problems_of(False, capsys)
    (tree / path).unlink()
    assert f"{path}: differs from the generated file" in problems_of(False, capsys)
    contracts.contracts(write=True)
    assert (tree / path).read_text(encoding="utf-8") == good


def test_stubs_of_a_removed_proto_are_named_and_removed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tree / "protos/sample/v1/old_pb2.py"
    stale.write_text("")
    assert "protos/sample/v1/old_pb2.py: differs from the generated file" in problems_of(False, capsys)
    contracts.contracts(write=True)
    assert not stale.exists()


def test_a_breaking_schema_is_not_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_field(tree / USAGE, "colour")
    before = (tree / USAGE).read_text(encoding="utf-8")
    problems = problems_of(True, capsys)
    assert "billing.v1.UsageRecorded.colour: removed: raise VERSION and keep the old struct" in problems
    assert (tree / USAGE).read_text(encoding="utf-8") == before


def test_with_git_a_schema_is_compared_with_the_commit_and_not_with_the_file(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = (tree / USAGE).read_text(encoding="utf-8")
    add_field(tree / USAGE, "colour")
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "with colour")
    (tree / USAGE).write_text(good, encoding="utf-8")
    assert "billing.v1.UsageRecorded.colour: removed" in problems_of(False, capsys)


def test_on_a_branch_a_schema_is_compared_with_the_main_branch(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (tree / USAGE).read_text(encoding="utf-8")
    add_field(tree / USAGE, "colour")
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "with colour")
    git(tree, "checkout", "-b", "topic")
    (tree / USAGE).write_text(good, encoding="utf-8")
    git(tree, "commit", "-am", "without colour")
    assert "billing.v1.UsageRecorded.colour: removed" in problems_of(False, capsys)


def test_a_removed_message_is_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(tree / USAGE, tree / "protos/schemas/billing.v1.Forgotten.json")
    assert "billing.v1.Forgotten: the message was removed: keep its struct" in problems_of(True, capsys)
    assert (tree / "protos/schemas/billing.v1.Forgotten.json").exists()


def test_a_breaking_proto_is_not_written(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proto = tree / "protos/sample/v1/sample.proto"
    proto.write_text(proto.read_text().replace("string note = 2;", ""))
    assert "gRPC clawbus.sample.v1.SeenReply field 2: removed" in problems_of(True, capsys)
    assert "note" in (tree / "protos/sample/v1/sample_pb2.pyi").read_text()


def test_a_proto_that_does_not_compile_is_named(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tree / "protos/sample/v1/sample.proto").write_text("message {")
    assert "do not compile" in problems_of(False, capfd)


def test_a_golden_example_must_be_there_and_stay_readable(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = tree / "protos/schemas/golden/memory.v1.IndexDocument.json"
    good = golden.read_text()
    golden.write_text('{"document_id": "7"}')
    assert "IndexDocument.json: Invalid UUID" in problems_of(False, capsys)
    golden.unlink()
    assert "IndexDocument.json: missing: write one example" in problems_of(True, capsys)
    golden.write_text(good)
    contracts.contracts()


def test_a_golden_example_that_was_committed_is_never_changed(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "all")
    golden = tree / "protos/schemas/golden/memory.v1.IndexDocument.json"
    golden.write_text(golden.read_text().replace("9999", "8888"))
    assert "IndexDocument.json: changed: restore it, because records of this form exist" in problems_of(False, capsys)
