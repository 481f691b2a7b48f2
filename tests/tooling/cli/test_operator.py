"""Tests of the operator's commands on real engines: their output for people and programs, and their effects."""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

import httpx
import msgspec
import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from infra.clock import uuid7
from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres import db
from infra.postgres.dead_letters import DeadLetter, park, store_dead_letters
from infra.postgres.tx import Tx
from infra.service.replay import ReplayResult
from tests.infra.conftest import SampleDatabase
from tests.infra.conftest import desk as desk
from tests.infra.conftest import ledger_database as ledger_database
from tests.infra.conftest import sample as sample
from tooling.cli import app as cli
from tooling.cli import dlq, logs, outbox, replay, rerate, run
from tooling.cli.client import Gateway
from tooling.cli.output import print_json
from tooling.stack import operator
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError
from tooling.stack.keys import make_keys
from tooling.stack.supervisor import Supervisor
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.sample.desk.domain import WriteNote
from tooling.testing.sample.desk.publishing import NOTEBOOK
from tooling.testing.stack import Stack

T = TypeVar("T")
DESK, LEDGER = "tooling.testing.sample.desk", "tooling.testing.sample.ledger"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: Stack, sample: SampleDatabase) -> Path:
    """A state folder with access to the suite's engines and to the module's database."""
    engines = {"postgres": {"url": sample.admin_url}, "kafka": {"bootstrap_servers": stack.kafka_bootstrap_servers}}
    (tmp_path / "credentials.json").write_text(json.dumps({"engines": engines}))
    make_keys(tmp_path / "keys", ("sample_desk", "sample_ledger"), "")
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def claw(command: typer.Typer, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments)


def test_no_text_from_outside_steers_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_json({"text": "\x9b31m \x1b]0;title\x07 \u202e"})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"text": "\x9b31m \x1b]0;title\x07 \u202e"}
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))
    log = Supervisor(tmp_path).log("nginx")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes('error: "GET /\x1b]0;title\x07 \x9b31m"\n\tat \xff\n'.encode() + b"\xff\n")
    assert told(cli.build(("logs",)), "logs", "nginx").splitlines() == [
        r'error: "GET /\x1b]0;title\x07 \x9b31m"',
        "\tat ÿ",
        r"\xff",
    ]


def told(command: typer.Typer, *arguments: str) -> str:
    """The output of the command, which must succeed."""
    result = claw(command, *arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return str(result.stdout)


def refused(command: typer.Typer, *arguments: str) -> str:
    """The text of the error that `main` would print."""
    result = claw(command, *arguments)
    assert isinstance(result.exception, (NotFound, Conflict, EngineError)), result.output
    return str(result.exception)


def within(service: str, work: Callable[[Tx], Awaitable[T]]) -> T:
    """Runs `work` in a transaction of the service."""

    async def run() -> T:
        url = operator.engines_access()["postgres"]["url"]
        async with operator.database(url, service) as database, database.begin() as tx:
            return await work(tx)

    return asyncio.run(run())


def query(service: str, statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
    return within(service, lambda tx: tx.sql(statement, *arguments))


def audited(service: str, object_id: str) -> list[tuple[str, str]]:
    """(action, actor) of each audit record about the object."""
    rows = query(service, "SELECT body FROM outbox WHERE destination = 'audit.logs' ORDER BY position")
    acts = [msgspec.json.decode(body) for (body,) in rows]
    return [(act["action"], act["actor"]) for act in acts if act["object_id"] == object_id]


def dead(service: str, key: str, *states: str, error: str = "ValueError: will not do") -> list[str]:
    """Stores dead letters of one key in these states, in order. Returns their ids."""

    async def store(tx: Tx) -> list[str]:
        letters = [
            DeadLetter(
                destination="sample.events",
                place=f"{uuid4()}/0/{offset}",
                message_id=str(uuid7()),
                key=key,
                tenant_id=None,
                attempts=3,
                error=error,
                headers='{"ce_type": "sample.v1.NoteTaken", "odd": "\\u001b[31m"}',
                payload=b'{"notebook": "b",\n "text": "\x1b[2J"}',
                state=state,
            )
            for offset, state in enumerate(states)
        ]
        connection = await tx.connection()
        await store_dead_letters(connection, service, "kafka", letters, None)
        await park(connection, service, "sample.events", key)
        rows = await tx.sql("SELECT id FROM dead_letter WHERE key = $1 ORDER BY seq", key)
        return [str(id_) for (id_,) in rows]

    return within(service, store)


@pytest.fixture(autouse=True)
def no_letters_left_over(home: Path) -> None:
    for service in ("sample_desk", "sample_ledger"):
        query(service, "DELETE FROM dead_letter")


def state(id_: str) -> str:
    [(found,)] = query("sample_ledger", "SELECT state FROM dead_letter WHERE id = $1", UUID(id_))
    return str(found)


def test_the_list_shows_every_service_on_80_columns() -> None:
    assert told(dlq.app, "list") == "No dead letters.\n"
    failed, waiting = dead(
        "sample_ledger", "a key " + "that is long " * 10, "failed", "waiting", error="x\x1b[31m" * 40
    )
    [other] = dead("sample_desk", "k", "failed")
    text = told(dlq.app, "list")
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert all(id_ in text for id_ in (failed, waiting, other))
    assert "sample_ledger could not handle a message of kafka:sample.events, key a key" in text
    # The time is not cut.
    times = [line for line in text.splitlines() if line.endswith(" UTC")]
    assert [line.split()[:2] for line in times] == [[failed, "failed"], [waiting, "waiting"], [other, "failed"]]
    assert "  after 3 attempts: ValueError: will not do" in text
    assert "2 failed, 1 waiting" in text
    assert other not in told(dlq.app, "list", "--service", "sample_ledger")
    assert "There may be more than 1." in told(dlq.app, "list", "--limit", "1")


def test_the_list_is_json_for_programs() -> None:
    assert told(dlq.app, "list", "--json") == "[]\n"
    [id_] = dead("sample_ledger", "k", "failed")
    [letter] = json.loads(told(dlq.app, "list", "--json"))
    assert (letter["id"], letter["service"], letter["key"]) == (id_, "sample_ledger", "k")
    shown = json.loads(told(dlq.app, "show", id_, "--json"))
    assert shown == letter | {"payload": '{"notebook": "b",\n "text": "\x1b[2J"}'}
    assert letter["payload"] == ""
    assert audited("sample_ledger", id_) == [("dead_letter.read", operator.actor())]


def test_a_dead_letter_is_shown_whole_with_control_characters_escaped() -> None:
    [id_] = dead("sample_ledger", "k", "failed", error="ValueError: " + "long " * 40 + "end")
    text = told(dlq.app, "show", id_)
    assert "\x1b" not in text
    assert "long end" in text
    assert "ce_type: sample.v1.NoteTaken" in text
    assert '"text": "\\x1b[2J"}' in text
    assert "None" not in text


def test_a_redrive_is_requested_and_audited() -> None:
    first, waiting = dead("sample_ledger", "k", "failed", "waiting")
    [second] = dead("sample_ledger", "other", "failed")
    assert "2 dead letters are marked for redrive" in told(dlq.app, "redrive", first, first, second)
    assert (state(first), state(waiting), state(second)) == ("redriving", "waiting", "redriving")
    for id_ in (first, second):
        assert audited("sample_ledger", id_) == [("dead_letter.redrive", operator.actor())]


def test_all_failed_dead_letters_of_one_service_are_redriven() -> None:
    first, waiting = dead("sample_ledger", "k", "failed", "waiting")
    [second] = dead("sample_ledger", "other", "failed")
    [elsewhere] = dead("sample_desk", "k", "failed")
    answer = told(dlq.app, "redrive", "--all", "--service", "sample_ledger", "--json")
    assert json.loads(answer) == {"redriving": 2, "matched": 2, "too_old": 0, "dry_run": False}
    assert [state(id_) for id_ in (first, waiting, second)] == ["redriving", "waiting", "redriving"]
    assert audited("sample_desk", elsewhere) == []


def test_dead_letters_are_listed_and_redriven_by_cause() -> None:
    assert told(dlq.app, "list", "--by-cause") == "No dead letters.\n"
    first, waiting = dead("sample_ledger", "k", "failed", "waiting", error="Late: 7 s")
    [second] = dead("sample_ledger", "other", "failed", error="Late: 8 s\x1b")
    [elsewhere] = dead("sample_desk", "k", "failed", error="Late: 9 s")
    text = told(dlq.app, "list", "--by-cause", "--service", "sample_ledger")
    assert "1 failed, 1 waiting, 0 redriving" in text
    assert "Late: # s\\x1b" in text
    groups = json.loads(told(dlq.app, "list", "--by-cause", "--json"))
    assert [(group["service"], group["cause"], group["failed"]) for group in groups] == [
        ("sample_ledger", "Late: # s", 1),
        ("sample_desk", "Late: # s", 1),
        ("sample_ledger", "Late: # s\x1b", 1),
    ]
    cause = ("redrive", "--cause", "Late: # s")
    assert "2 dead letters would be redriven" in told(dlq.app, *cause, "--dry-run")
    assert "would" in told(dlq.app, *cause, "--dry-run", "--service", "sample_ledger")
    assert state(first) == "failed"
    assert "1 dead letter is marked" in told(dlq.app, *cause, "--service", "sample_ledger", "--rate", "5")
    assert (state(first), state(waiting), state(second)) == ("redriving", "waiting", "failed")
    assert audited("sample_ledger", "Late: # s") == [("dead_letter.redrive_all", operator.actor())]
    assert audited("sample_desk", elsewhere) == []
    assert told(dlq.app, "redrive", "--cause", "Never seen") == (
        "No failed dead letter matches: see ./claw dlq list --by-cause\n"
    )


def test_the_most_frequent_causes_are_listed_also_if_older_ones_are_rare() -> None:
    dead("sample_ledger", "k", "failed", error="Rare")
    for key in ("one", "two"):
        dead("sample_ledger", key, "failed", error="Frequent")
    text = told(dlq.app, "list", "--by-cause", "--limit", "1")
    assert "Frequent" in text
    assert "There may be more than 1. To list more: ./claw dlq list --by-cause --limit 10" in text


def test_a_discard_is_done_and_audited() -> None:
    first, waiting = dead("sample_ledger", "k", "failed", "waiting")
    assert "is discarded" in told(dlq.app, "discard", first)
    assert json.loads(told(dlq.app, "discard", waiting, "--json")) == {"discarded": waiting}
    assert (state(first), state(waiting)) == ("discarded", "discarded")
    assert audited("sample_ledger", first) == [("dead_letter.discard", operator.actor())]


def test_a_refused_command_says_why_and_changes_nothing() -> None:
    first, waiting = dead("sample_ledger", "k", "failed", "waiting")
    unknown = str(uuid7())
    for command in ("show", "redrive", "discard"):
        assert refused(dlq.app, command, unknown).startswith(f"dead letter {unknown}: does not exist")
    assert "waits behind a failed one of its key" in refused(dlq.app, "redrive", first, waiting)
    assert state(first) == "failed"
    assert refused(dlq.app, "list", "--service", "sample_lodger") == (
        "service sample_lodger: not in this stack, which has sample_desk, sample_front, sample_ledger"
    )
    assert "sample_lodger: not in this stack" in refused(dlq.app, "redrive", "--all", "--service", "sample_lodger")
    for words in (
        *([], ["--all"], ["--service", "sample_ledger"], [first, "--all", "--service", "sample_ledger"]),
        *([first, "--dry-run"], ["--all", "--cause", "x"]),
    ):
        assert "give the ids of dead letters, or --all --service NAME" in refused(dlq.app, "redrive", *words)
    told(dlq.app, "redrive", first)
    assert "is redriving; must be failed to be redriven" in refused(dlq.app, "redrive", first)
    assert audited("sample_ledger", waiting) == []


def test_without_a_stack_each_command_names_the_command_that_starts_one(home: Path) -> None:
    commands = [
        (dlq.app, ["list"]),
        (run.app, ["list"]),
        (run.app, ["show", str(uuid7())]),
        (cli.build(("logs",)), ["logs", "--search", "x"]),
        (outbox.app, ["resend", "x"]),
        (only(replay.replay), [f"{LEDGER}.count_notes"]),
    ]
    gone = {"postgres": {"url": "postgresql://a:b@127.0.0.1:1/c"}, "kafka": {"bootstrap_servers": "127.0.0.1:1"}}
    credentials = {"base_url": "http://127.0.0.1:1", "admin_token": "", "engines": gone}
    (home / "credentials.json").write_text(json.dumps(credentials))
    for command, words in commands:
        assert "does not answer" in refused(command, *words)
        assert "./claw up" in refused(command, *words)
    (home / "credentials.json").unlink()
    for command, words in commands:
        assert "no stack was started here. Start one with ./claw up" in refused(command, *words)


def test_in_containers_the_environment_names_the_stack(
    home: Path, stack: Stack, sample: SampleDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    [id_] = dead("sample_ledger", "k", "failed")
    (home / "credentials.json").unlink()
    monkeypatch.setenv("CLAW_ADMIN_DATABASE_URL", sample.admin_url)
    assert refused(dlq.app, "list").startswith("CLAW_GATEWAY_URL: must be set in the environment, as in the container")
    for variable in ("CLAW_GATEWAY_URL", "CLAW_ADMIN_TOKEN", "CLAW_MILVUS_URL", "CLAW_OPENSEARCH_URL"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("CLAW_KAFKA_BOOTSTRAP_SERVERS", stack.kafka_bootstrap_servers)
    monkeypatch.setenv("CLAW_KEYS_FOLDER", str((home / "keys").rename(home / "keys of containers")))
    assert id_ in told(dlq.app, "list")
    assert json.loads(told(dlq.app, "show", id_, "--json"))["payload"]
    assert "no kept messages to 'x'" in refused(outbox.app, "resend", "x")
    monkeypatch.setenv("CLAW_ADMIN_DATABASE_URL", "postgresql://a:b@127.0.0.1:1/c")
    assert "docker compose ps shows which" in refused(dlq.app, "list")


def only(function: Callable[..., None]) -> typer.Typer:
    """A command line with this one command."""
    command = typer.Typer()
    command.command()(function)
    return command


def write_history(book: str) -> None:
    """Writes the rows of two notes that desk and ledger have handled."""

    async def write(tx: Tx) -> None:
        await tx.decide(NOTEBOOK.stream(book), WriteNote("abc"))
        await tx.decide(NOTEBOOK.stream(book), WriteNote("de"))

    async def count(tx: Tx) -> None:
        await tx.sql(
            "INSERT INTO inbox SELECT message_id, 'sample_ledger' FROM sample_desk.outbox WHERE key = $1", book
        )
        await tx.sql("INSERT INTO effect VALUES ($1, 1, 1), ($1, 2, 2)", book)
        await tx.sql("INSERT INTO total VALUES ($1, 2, 5)", book)

    within("sample_desk", write)
    query("sample_desk", "UPDATE outbox SET published_at = now() WHERE key = $1", book)
    within("sample_ledger", count)


def test_a_command_may_take_longer_than_a_statement_of_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bus was wiped, a week's messages are marked in one statement."""
    monkeypatch.setattr(db, "STATEMENT_TIMEOUT_MS", 50)
    monkeypatch.setattr(db, "TRANSACTION_TIMEOUT_MS", 50)
    assert len(query("sample_ledger", "SELECT pg_sleep(0.2)")) == 1


def test_kept_messages_are_sent_again_and_the_act_is_audited() -> None:
    write_history("resent")
    pending = "SELECT count(*) FROM outbox WHERE published_at IS NULL AND destination = 'sample.events'"
    [(before,)] = query("sample_desk", pending)
    assert before == 0
    counts = json.loads(told(outbox.app, "resend", SAMPLE_EVENTS.name, "--json"))
    [(after,)] = query("sample_desk", pending)
    assert counts == {"sample_desk": after}
    assert after >= 2
    assert audited("sample_desk", SAMPLE_EVENTS.name)[-1] == ("outbox.resend", operator.actor())
    query("sample_desk", "UPDATE outbox SET published_at = now()")
    text = told(outbox.app, "resend", SAMPLE_EVENTS.name, "--since", "2020-01-01")
    assert text == f"sample_desk: its relay will send {after} messages to sample.events again\n"
    query("sample_desk", "UPDATE outbox SET published_at = now()")
    assert "no kept messages to 'sample.events'" in refused(
        outbox.app, "resend", SAMPLE_EVENTS.name, "--since", "2100-01-01"
    )
    assert "no kept messages to 'sample.event'." in refused(outbox.app, "resend", "sample.event")


def test_a_projection_is_rebuilt_compared_and_switched() -> None:
    write_history("replayed")
    arguments = (f"{LEDGER}.count_notes", "--from-events", DESK)
    name = "sample_ledger.count_notes"
    text = told(only(replay.replay), *arguments)
    assert "total: equal, live" in text
    assert "Switched after" in text
    assert max(map(len, text.splitlines())) <= 80
    assert audited("sample_ledger", name) == [("projection.switch", operator.actor())]

    query("sample_ledger", "UPDATE total SET letters = 50 WHERE notebook = 'replayed'")
    result = claw(only(replay.replay), *arguments)
    assert result.exit_code == 1
    assert "total: different" in result.stdout
    assert "The live tables stay." in result.stdout
    assert len(audited("sample_ledger", name)) == 1

    rebuilt = msgspec.json.decode(told(only(replay.replay), *arguments, "--switch", "--json"), type=ReplayResult)
    assert rebuilt.switched
    assert [table.equal for table in rebuilt.tables] == [False, True]
    assert query("sample_ledger", "SELECT letters FROM total WHERE notebook = 'replayed'") == [(5,)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "NAME: must have the form <service>.<name>, such as agent.runs; --list shows all"),
        (["count_notes"], "must have the form <service>.<name>"),
        (["unknown.count"], "service unknown: does not exist; must be one of user, agent"),
        ([f"{LEDGER}.count"], f"has no read model 'count'; it has {LEDGER}.count_notes. --list"),
        ([f"{DESK}.take_note"], "has no read model 'take_note'; it has none. --list"),
        (["log_aggregator.nosuch"], "it has log_aggregator.index_lines, log_aggregator.index_agent_events, "),
        (
            [f"{LEDGER}.count_notes", "--from-events", "unknown"],
            "service unknown: does not exist; must be one of user, agent",
        ),
        ([f"{LEDGER}.count_notes"], "topic sample.events does not exist"),
    ],
)
def test_a_replay_that_is_not_possible_says_why(words: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAW_TOPIC_PREFIX", "")
    assert said in refused(only(replay.replay), *words)


@pytest.mark.parametrize(
    "error",
    [
        NotFound("dead letter 1: does not exist"),
        Conflict("it waits\nfor \x1b[2J"),
        InvalidMessage("id", "is not a UUID"),
    ],
)
def test_an_error_that_a_person_can_correct_is_one_sentence_and_exit_code_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(dlq, "app", only(fail))
    monkeypatch.setattr(sys, "argv", ["claw", "dlq", "fail"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"claw: {error}\n".replace("\x1b", r"\x1b")


def test_text_from_outside_is_never_read_as_markup() -> None:
    """A ``[/]`` in it would end the command with an error, and a ``[link=…]`` would lie."""
    wrong = []
    for file in sorted((CHECKOUT / "tooling" / "cli").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "print":
                plain = any(option.arg == "markup" for option in call.keywords)
                texts = [text for text in call.args if isinstance(text, ast.JoinedStr)]
                if not plain and any("printable(" in ast.unparse(text) for text in texts):
                    wrong.append(f"{file.name}:{call.lineno}")
    assert wrong == []


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The searches that a gateway with 450 matching lines was asked for."""
    asked: list[dict[str, str]] = []
    template = {"timestamp": "t", "level": "error", "service": "agent", "message": "m", "data": {}}

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        first, limit = int(asked[-1].get("cursor", "0")), int(asked[-1]["limit"])
        assert limit <= 200
        last = min(first + limit, 450)
        items = [template | {"data": {"n": n}} for n in range(first, last)]
        return httpx.Response(200, json={"items": items, "next": str(last) if last < 450 else None})

    @asynccontextmanager
    async def gateway(*_: object) -> AsyncIterator[Gateway]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://gateway") as client:
            yield Gateway(client)

    monkeypatch.setattr(logs, "gateway", gateway)
    monkeypatch.setattr(operator, "access", lambda: {"base_url": "", "admin_token": ""})
    return asked


def test_a_search_of_logs_tells_that_there_are_more_lines(index: list[dict[str, str]]) -> None:
    command = cli.build(("logs",))
    for options, count, more in (((), 50, True), (("--limit", "430"), 430, True), (("--limit", "500"), 450, False)):
        result = claw(command, "logs", "--saved", "errors", "--json", *options)
        assert [line["data"]["n"] for line in json.loads(result.stdout)] == list(range(count))
        assert ("Older lines match too" in result.stderr) is more
    assert "--trace: 'run' must be 32 digits from 0 to f" in refused(command, "logs", "--trace", "run")
    unknown = claw(command, "logs", "--saved", "warnings")
    assert unknown.exit_code == 2
    assert "is not one of 'errors', 'dead_letters'" in " ".join(unknown.stderr.replace("│", "").split())


def test_the_log_of_a_service_is_searched_by_time(index: list[dict[str, str]]) -> None:
    command, times = cli.build(("logs",)), ("--since", "2026-11-30T08:00:00", "--until", "2026-11-30T09:00:00")
    told(command, "logs", "channel", *times)
    [asked] = index
    assert asked == {
        "service": "channel",
        "since": datetime.fromisoformat(times[1]).astimezone().isoformat(),
        "until": datetime.fromisoformat(times[3]).astimezone().isoformat(),
        "limit": "50",
    }
    assert "the index has lines of" in refused(command, "logs", "postgres", *times)
    for option in (("--json",), ("--limit", "7")):
        assert f"{option[0]}: needs a search" in refused(command, "logs", "channel", *option)


def test_an_error_of_one_field_is_told_once() -> None:
    async def ask(*errors: dict[str, str]) -> None:
        problem = {"detail": "at: must be from 1 to 6", "errors": errors}
        transport = httpx.MockTransport(lambda _: httpx.Response(422, json=problem))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            await Gateway(client).get("/state")

    at, of = {"field": "at", "message": "must be from 1 to 6"}, {"field": "of", "message": "is unknown"}
    with pytest.raises(EngineError) as refusal:
        asyncio.run(ask(at, of))
    assert str(refusal.value) == "GET /state was answered 422: at: must be from 1 to 6\n  of: is unknown"


def test_the_list_of_runs_has_whole_ids_on_80_columns_however_slow_they_are() -> None:
    """Slow runs are looked for, and their ids are copied to `./claw run show`."""
    rows = [
        {
            "received_at": "2026-11-30T08:00:00+00:00",
            "run_id": str(uuid7()),
            "status": status,
            "seconds": {"waited": waited, "ran": ran, "sent": sent},
        }
        for status, waited, ran, sent in (
            ("completed", 0.25, 3.41, None),
            ("indeterminate", 86400.2, 300.25, None),
            ("completed", 864000.1, 86400.1, 86400.1),
        )
    ]
    console = Console(file=StringIO(), width=80, highlight=False)
    run.draw_list(console, rows)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert f"11-30 08:00 {rows[0]['run_id']} completed" in lines[1]
    assert lines[1].split()[-2:] == ["0.2", "3.4"]
    assert all(any(row["run_id"] in line for line in lines) for row in rows)
    assert lines[-1].split()[-3:] == ["864000", "86400", "86400"]
    none = Console(file=StringIO(), width=80)
    run.draw_list(none, [])
    assert none.file.getvalue() == "No runs in this period.\n"  # type: ignore[attr-defined]


def test_a_step_without_a_name_is_shown_by_its_kind() -> None:
    step = {"n": 1, "kind": "retrieve", "name": "", "status": "completed", "attempt": 1, "error": None}
    state = {"at": 1, "run_id": str(uuid7()), "status": "running", "events": [], "steps": [step]}
    console = Console(file=StringIO(), width=80, highlight=False)
    run.draw_state(console, state | {"tokens": 0, "attempts": 1, "fork_step": 1})
    assert "step 1: retrieve, completed, attempt 1\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_differences_of_prices_are_shown_on_80_columns_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    one = {
        "tenant_id": str(uuid7()),
        "records": 1_000_000,
        "from_version": f"acme/{'long-model-' * 6}[/]@1",
        "to_version": "acme/model@2",
        "difference_nanos": -(10**18),
    }
    left_out = one | {"invoice_number": "INV-000001", "reason": "a unit was not reported, and the price needs it"}
    answer = {
        "dry_run": True,
        "records": 2,
        "changed": 1,
        "difference_nanos": 0,
        "items": [one],
        "left_out": [left_out],
    }
    asked: list[dict[str, Any]] = []

    @asynccontextmanager
    async def gateway(*_: object) -> AsyncIterator[Gateway]:
        def answered(request: httpx.Request) -> httpx.Response:
            asked.append(json.loads(request.content))
            return httpx.Response(200, json=answer)

        async with httpx.AsyncClient(transport=httpx.MockTransport(answered), base_url="http://gateway") as client:
            yield Gateway(client)

    monkeypatch.setattr(rerate, "gateway", gateway)
    monkeypatch.setattr(operator, "access", lambda: {"base_url": "", "admin_token": ""})
    command, words = cli.build(("rerate",)), ("rerate", "--from", "2026-11-01", "--to", "2026-12-01")
    assert json.loads(told(command, *words, "--json")) == answer
    shown = told(command, *words)
    assert max(map(len, shown.splitlines())) <= 80
    assert f"{one['tenant_id']}  1000000 records" in shown.splitlines()
    together = "".join(shown.split())
    assert together.count("long-model-[/]@1→acme/model@2") == 2
    assert "not booked: a unit was not reported" in shown
    assert "(INV-000001)" in together
    assert shown.splitlines()[-1] == "2 records, 1 differences found; --book books them"
    assert [body["dry_run"] for body in asked] == [True, True]


@pytest.mark.parametrize("time", ["0001-01-01", "0001-01-01T00:00:00+14:00"])
def test_a_time_that_no_clock_has_is_an_error_of_the_option(time: str) -> None:
    result = CliRunner().invoke(cli.build(("run",)), ["run", "list", "--since", time])
    assert isinstance(result.exception, EngineError), result.output
    assert str(result.exception).startswith(f"--since: {time[:10]}")
