"""Stored values get a new master key while others write, and an interruption loses nothing."""

from __future__ import annotations

import ast
import asyncio
import base64
import importlib
import os
from pathlib import Path
from uuid import uuid4

import pytest

from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.postgres.db import Pool
from infra.security import rewrap as module
from infra.security.crypto import Cipher
from infra.security.rewrap import KERNEL, SealedColumn, count_old, rewrap
from infra.security.subjects import SubjectKeys
from protos.catalog import SERVICES
from tooling.stack import keys
from tooling.stack.checkout import CHECKOUT

[SUBJECT_KEY] = [column for column in KERNEL if column.table == "subject_key"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make_keys(tmp_path, ["desk"])
    return tmp_path


def cipher(folder: Path) -> Cipher:
    return Cipher(keys.master_file(folder, "desk"))


async def all_open(engine: Pool, one: Cipher) -> int:
    """Opens every subject key with this cipher."""
    subjects = SubjectKeys(one)
    database = Database(engine, "desk")
    async with database.begin() as tx:
        rows = await tx.sql("SELECT tenant_id, subject_id FROM subject_key WHERE wrapped IS NOT NULL")
        await subjects.keys(tx, [(tenant, subject) for tenant, subject in rows])
    return len(rows)


async def test_all_values_are_sealed_again_while_others_write_and_after_an_interruption(
    desk: Database, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    async with desk.begin() as tx:
        await tx.sql("DELETE FROM subject_key")
        await SubjectKeys(cipher(folder)).keys(tx, [("t1", str(n)) for n in range(100)])
    stop, written = asyncio.Event(), 0

    async def write() -> None:
        nonlocal written
        subjects = SubjectKeys(cipher(folder))
        while not stop.is_set():
            async with desk.begin() as tx:
                # An old one is read, a new one is made, and one is destroyed: its row stays null.
                await subjects.keys(tx, [("t1", "5"), ("t2", uuid4().hex)])
                await tx.sql("UPDATE subject_key SET wrapped = NULL WHERE subject_id = '6'")
            written += 1

    writers = [asyncio.create_task(write()) for _ in range(3)]
    before = keys.master_file(folder, "desk").read_text()
    assert keys.new_master(folder, "desk")
    done = 0

    def interrupted(rows: int) -> None:
        nonlocal done
        done += rows
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await rewrap(desk.engine, cipher(folder), SUBJECT_KEY, interrupted)
    left = await count_old(desk.engine, cipher(folder), SUBJECT_KEY)
    assert left > 0
    # The second call goes on with the same key.
    assert not keys.new_master(folder, "desk")
    start = written
    while written < start + 5:
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.gather(*writers)
    while await count_old(desk.engine, cipher(folder), SUBJECT_KEY):
        await rewrap(desk.engine, cipher(folder), SUBJECT_KEY, lambda _: None)
    keys.forget_masters(folder, "desk")
    assert keys.retired_file(folder, "desk").read_text() == before
    assert keys.master_file(folder, "desk").stat().st_mode & 0o777 == 0o600
    only_new = Cipher(keys.master_file(folder, "desk").read_text())
    assert await all_open(desk.engine, only_new) > 100
    with pytest.raises(RuntimeError, match="another master key"):
        await all_open(desk.engine, Cipher(before))


async def test_a_locked_row_is_left_for_the_next_call(desk: Database, folder: Path) -> None:
    async with desk.begin() as tx:
        await tx.sql("DELETE FROM subject_key")
        await SubjectKeys(cipher(folder)).keys(tx, [("t1", str(n)) for n in range(3)])
    keys.new_master(folder, "desk")
    async with desk.begin() as tx:
        await tx.sql("SELECT 1 FROM subject_key WHERE subject_id = '1' FOR UPDATE")
        await rewrap(desk.engine, cipher(folder), SUBJECT_KEY, lambda _: None)
        assert await count_old(desk.engine, cipher(folder), SUBJECT_KEY) == 1
    await rewrap(desk.engine, cipher(folder), SUBJECT_KEY, lambda _: None)
    assert await count_old(desk.engine, cipher(folder), SUBJECT_KEY) == 0


async def test_a_value_that_does_not_open_stops_the_work_and_changes_nothing(desk: Database, folder: Path) -> None:
    async with desk.begin() as tx:
        await tx.sql("DELETE FROM subject_key")
        await SubjectKeys(cipher(folder)).keys(tx, [("t1", "a"), ("t1", "b")])
    keys.new_master(folder, "desk")
    wrong = SealedColumn("subject_key", "wrapped", "subject key", ("subject_id", "tenant_id"))
    with pytest.raises(InvalidMessage):
        await rewrap(desk.engine, cipher(folder), wrong, lambda _: None)
    assert await count_old(desk.engine, cipher(folder), SUBJECT_KEY) == 2
    assert await all_open(desk.engine, cipher(folder)) == 2


def test_a_process_opens_with_a_new_key_at_once_and_seals_with_it_soon(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = cipher(folder), cipher(folder)
    old = writer.seal("old", "p")
    keys.new_master(folder, "desk")
    new = cipher(folder).seal("new", "p")
    assert new[1:5] != old[1:5]
    assert (reader.open(new, "p"), reader.open(old, "p")) == (b"new", b"old")
    monkeypatch.setattr("infra.security.watched.LOOK_SECONDS", 0.0)
    assert writer.seal("x", "p")[1:5] == new[1:5]


def test_the_master_key_of_an_older_version_opens_and_does_not_seal(tmp_path: Path) -> None:
    shared = base64.b64encode(os.urandom(32)).decode()
    keys.make_keys(tmp_path, ["desk", "front"], shared)
    old = Cipher(shared).seal("x", "p")
    for service in ("desk", "front"):
        own = Cipher(keys.master_file(tmp_path, service))
        assert own.open(old, "p") == b"x"
        assert own.seal("x", "p")[1:5] != old[1:5]
    lines = {keys.master_file(tmp_path, service).read_text().split()[0] for service in ("desk", "front")}
    assert len(lines) == 2


# An auditor's line is sealed and not stored. A rotation makes older lines invalid.
KEPT = {"audit head"}


@pytest.mark.parametrize("service", SERVICES)
def test_every_purpose_of_a_service_is_declared(service: str) -> None:
    declared = importlib.import_module(f"services.{service}.__main__").service.sealed
    assert {column.purpose for column in declared} - {column.purpose for column in KERNEL} == purposes(service) - KEPT


def purposes(service: str) -> set[str]:
    """The purposes for which the service's code seals with its cipher."""
    found: set[str] = set()
    for path in sorted((CHECKOUT / "services" / service).rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "seal"
                and "cipher" in ast.unparse(node.func.value)
            ):
                purpose = node.args[1]
                found.add(str(constants[purpose.id] if isinstance(purpose, ast.Name) else ast.literal_eval(purpose)))
    return found
