"""Follows each recipe of CONTRIBUTING.md in a copy of the repository, and then runs the new code.

A recipe names files in its text. Code under ``New file `path`:`` becomes that file. A diff under a text that ends with
``In `path`:`` (or ``…, in `path`:``) changes that file: lines with a blank or a minus in front must be there, once and
together; lines with a minus go, lines with a plus come.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.infra.conftest import PASSWORDS
from tooling.testing.stack import free_ports

CHECKOUT = Path(__file__).parents[2]
TEXT = (CHECKOUT / "CONTRIBUTING.md").read_text()
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code of a recipe: a whole file, or a diff to one."""

    path: str
    language: str
    code: str


def recipe(name: str) -> str:
    [found] = [text for text in re.split(r"^### ", TEXT, flags=re.MULTILINE) if text.startswith(f"{name}\n")]
    return found


def blocks(text: str) -> Iterator[Block]:
    path, end = "", 0
    for fence in _FENCE.finditer(text):
        before = text[end : fence.start()].strip()
        names = re.findall(r"`([^`\s]+/[^`\s]+)`", before.rpartition("\n\n")[2])
        if names:
            path = names[0]
        end = fence.end()
        yield Block(path, fence[1], fence[2])


def changed(text: str, diff: str) -> str:
    """`text` after a diff without line numbers. Raises ValueError if the old lines are not there exactly once."""
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    if text.count(old) != 1:
        raise ValueError(f"these lines are there {text.count(old)} times, not once:\n{old}")
    return text.replace(old, new)


class Copy:
    """A copy of the repository in which recipes are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.touched: list[str] = []
        command = ["git", "-C", str(CHECKOUT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
        for path in filter(None, listed.split("\0")):
            if (CHECKOUT / path).is_file():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(CHECKOUT / path, root / path)

    def follow(self, name: str) -> None:
        for block in blocks(recipe(name)):
            file = self.root / block.path
            if block.language == "diff":
                file.write_text(changed(file.read_text(), block.code))
            else:
                assert not file.exists(), f"{block.path} is there already"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block.code)
            self.touched.append(block.path)

    def run(self, *command: str, **environment: str) -> str:
        """Runs a module or a program of the environment in the copy; its output. Fails with the output."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def python(self, script: str, **environment: str) -> str:
        return self.run(sys.executable, "-c", script, **environment)

    def claw(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "tooling.cli", *arguments)

    def check(self) -> None:
        """The cheap part of `./claw check`: format, lint and layers."""
        ruff, layers = (str(Path(sys.executable).with_name(name)) for name in ("ruff", "lint-imports"))
        files = [path for path in self.touched if path.endswith(".py")]
        self.run(ruff, "format", "--check", *files)
        self.run(ruff, "check", *files)
        self.run(layers)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_every_recipe_is_followed() -> None:
    recipes = set(re.findall(r"^### (.*)$", TEXT, re.MULTILINE))
    assert recipes == {f"Add {what}" for what in ("a vendor", "a tool", "a service", "an event", "a read model")} | {
        "Add an engine"
    }
    # Each test below has the name of its recipe as docstring.
    assert recipes <= {getattr(test, "__doc__", None) for test in globals().values()}


def test_every_file_that_is_named_exists_or_is_made_by_a_recipe() -> None:
    named = set(re.findall(r"`((?:protos|infra|services|tooling|tests|docs)/[^`\s]*)`", TEXT))
    made = {block.path for block in blocks(TEXT)}
    assert sorted(path for path in named - made if not (CHECKOUT / path).exists()) == []


def test_a_vendor(copy: Copy) -> None:
    """Add a vendor"""
    copy.follow("Add a vendor")
    copy.claw("contracts", "--write")
    copy.check()
    copy.python("""
from infra.clock import utcnow
from infra.errors import Unauthenticated
from protos.catalog import CATALOG, CHANNEL_INBOUND
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Request
pigeon = VENDORS["pigeon"]
credentials = pigeon.credentials(token="t")
body = b'{"id": "1", "roost": "r", "sender": "s", "text": "coo"}'
[letter] = pigeon.receive(Request("POST", "", {"x-pigeon-token": "t"}, body), credentials, utcnow()).items
assert (letter.conversation, letter.person, letter.text) == ("r", "s", "coo")
try:
    pigeon.receive(Request("POST", "", {"x-pigeon-token": "u"}, body), credentials, utcnow())
except Unauthenticated:
    pass
else:
    raise AssertionError("a forged letter is accepted")
assert "".join(pigeon.split("coo " * 100)).count("coo") == 100
assert CHANNEL_INBOUND["pigeon"].name == "channel.inbound.pigeon"
""")


def test_a_tool(copy: Copy) -> None:
    """Add a tool"""
    copy.follow("Add a tool")
    copy.check()
    copy.python("""
import asyncio
from types import SimpleNamespace
from infra.web.json_schema import check, check_schema
from services.plugin.tools.builtin import BUILTIN
tool, run = BUILTIN["count_words"]
check_schema("schema", tool.schema)
check("arguments", tool.schema, {"text": "two words"})
assert asyncio.run(run(SimpleNamespace(arguments={"text": "two words"}), None)) == {"words": 2}
""")


_PASSWORDS = f"{PASSWORDS.owner} {PASSWORDS.request} {PASSWORDS.worker}"
_TALLY = """
import asyncio, os
from pathlib import Path
from uuid import UUID
import msgspec
from infra.clock import utcnow
from infra.postgres.db import create_engine
from infra.postgres.schema import Passwords, migrate, prepare_database, role_url
from infra.postgres.database import Database
from protos.messages.channel import MessageReceived
from services.tally import handlers
url, passwords = os.environ["URL"], Passwords(*os.environ["PASSWORDS"].split())
messages = [
    MessageReceived(
        channel_id=UUID(int=n % 2), channel_type="telegram", agent_id=UUID(int=1), session_key="s",
        conversation_id="c", subject_id="p", vendor_message_id="v", text="x", received_at=utcnow(),
    )
    for n in range(3)
]
async def main():
    await prepare_database(url, {"tally": passwords})
    await migrate(url, "tally", Path("services/tally/migrations"))
    database = Database(create_engine(role_url(url, "tally", "worker", passwords.worker)), "tally")
    async with database.begin() as tx:
        await tx.sql("DELETE FROM received")
        BATCH
    async with database.begin() as tx:
        rows = await tx.sql("SELECT messages FROM received ORDER BY channel_id")
    await database.engine.dispose()
    assert [tuple(row) for row in rows] == [(2,), (1,)], rows
asyncio.run(main())
"""


def test_a_service(copy: Copy, database: str) -> None:
    """Add a service"""
    copy.follow("Add a service")
    copy.claw("contracts", "--write")
    copy.check()
    each = "for message in messages: await handlers.count_received.handler(message, tx)"
    copy.python(_TALLY.replace("BATCH", each), URL=database, PASSWORDS=_PASSWORDS)
    shown = copy.claw("map", "--json")
    assert '{"service":"tally","state":"code"}' in shown
    assert '{"service":"tally","state":"undeclared"}' not in shown
    copy.python("""
from tooling.stack.services import parts
from tooling.stack.home import ports_at
assert parts()["tally"].PORTS == {"tally": 8010, "tally_grpc": 9010}
for offset in (0, 400, 2000, 5000):
    ports_at(offset)
""")


def test_an_event(copy: Copy) -> None:
    """Add an event"""
    copy.follow("Add an event")
    copy.claw("contracts", "--write")
    copy.check()
    assert (copy.root / "protos/schemas/billing.v1.CreditAlmostUsed.json").exists()
    copy.run(sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-k", "CreditAlmostUsed", "tests/contracts")


def test_a_read_model(copy: Copy, database: str) -> None:
    """Add a read model"""
    copy.follow("Add a service")
    copy.follow("Add a read model")
    copy.claw("contracts", "--write")
    copy.check()
    batch = "await handlers.count_received.handler(messages, tx)"
    copy.python(_TALLY.replace("BATCH", batch), URL=database, PASSWORDS=_PASSWORDS)
    copy.python("""
from tooling.cli.replay import find
service, subscription = find("tally.count_received")
assert (service.name, subscription.projection) == ("tally", ("received",))
""")


def test_an_engine(copy: Copy) -> None:
    """Add an engine"""
    copy.follow("Add an engine")
    copy.check()
    [port] = free_ports(["files"]).values()
    copy.python(
        """
import asyncio, os, subprocess
from pathlib import Path
import httpx
from tooling.stack.engines import ENGINES
from tooling.stack.engines.base import Place, Secrets
from tooling.stack.home import ports_at
for offset in (0, 400, 2000, 5000):
    ports_at(offset)
home = Path("state")
home.mkdir()
place = Place(home.absolute(), {"files": int(os.environ["PORT"])}, Secrets(home / "secrets.json"))
engine = ENGINES["files"]
engine.install()
engine.prepare(place)
server = subprocess.Popen(engine.program(place).command, cwd=place.folder("files"))
async def version():
    async with asyncio.timeout(30):
        while True:
            try:
                return await engine.ready(place)
            except httpx.HTTPError:
                await asyncio.sleep(0.05)
try:
    assert asyncio.run(version())
finally:
    server.terminate()
    server.wait()
""",
        PORT=str(port),
    )


@pytest.mark.parametrize("text", ["a\nc\n", "a\nb\na\nb\n"])
def test_a_diff_whose_old_lines_are_not_there_once_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not once"):
        changed(text, " a\n-b\n+x\n")
    assert changed("a\nb\nc\n", " a\n-b\n+x\n") == "a\nx\nc\n"
