"""The intake against PostgreSQL: accepted rows, the drainer, and the direct way. No service runs here."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from infra.clock import utcnow, uuid7
from infra.errors import TooLarge, Transient
from infra.observe import logs
from infra.observe.metrics import Metrics
from infra.outgoing import shares, webhooks
from infra.outgoing.client import Outgoing
from infra.postgres.database import Database
from infra.postgres.tx import MAX_MESSAGE_BYTES
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys, destroy
from infra.web.raw import RawRequest
from services.channel.accounts import store as accounts
from services.channel.accounts.routing import Route
from services.channel.accounts.store import Accounts, AccountSecrets, ChannelAccount, new_token
from services.channel.domain import Pseudonyms, dedupe_hash
from services.channel.events import Attachment
from services.channel.intake import drainer
from services.channel.intake import ingest as module
from services.channel.intake.drainer import DRAIN_ROWS, Drainer
from services.channel.intake.ingest import ITEM_BYTES, MAX_DIRECT, MAX_ITEMS, Ingest
from services.channel.intake.webhooks import Webhooks
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Request
from services.channel.vendors.items import Ignored, Inbound, Moved, Received
from services.channel.vendors.webhook import Webhook, WebhookCredentials
from tooling.testing.platform import MASTER_KEY, Platform


def message(n: object, *, conversation: str = "c", ids: tuple[str, ...] | None = None, person: str = "ada") -> Inbound:
    return Inbound(ids or (f"id/{n}",), conversation, person, str(n), f"text {n}")


class Intake:
    """An `Ingest` of one channel, and the rows that it wrote."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.database: Database = platform.database("channel")
        self.account = ChannelAccount(
            uuid7(), str(uuid7()), VENDORS["webhook"], uuid7(), None, Pseudonyms(os.urandom(32)), "", True, None
        )
        cipher = Cipher(MASTER_KEY)
        self.ingest = Ingest(self.database, cipher, SubjectKeys(cipher))
        self.drainer = Drainer(self.ingest)

    def another(self) -> Drainer:
        """As another process has it."""
        cipher = Cipher(MASTER_KEY)
        return Drainer(Ingest(self.database, cipher, SubjectKeys(cipher)))

    async def accept(self, *items: Inbound | Ignored | Moved, traceparent: str | None = None) -> None:
        await self.ingest.accept(self.account, items, traceparent)

    async def burst(self, items: Sequence[Inbound]) -> None:
        """Calls at the same moment, so many that they are accepted and not stored directly."""
        assert len(items) > MAX_DIRECT
        await asyncio.gather(*(self.accept(item) for item in items))

    async def rows(self, statement: str) -> list[tuple[Any, ...]]:
        async with self.database.begin() as tx:
            return list(await tx.sql(statement, self.account.id))

    async def accepted(self) -> int:
        [(count,)] = await self.rows("SELECT count(*) FROM accepted WHERE channel_id = $1")
        return int(count)

    async def ignored(self) -> list[str]:
        statement = "SELECT ignored FROM inbound_seen WHERE channel_id = $1 AND ignored IS NOT NULL"
        return [reason for (reason,) in await self.rows(statement)]

    def sibling(self) -> ChannelAccount:
        """The channel of another tenant."""
        return self.account._replace(id=uuid7(), tenant_id=str(uuid7()), pseudonyms=Pseudonyms(os.urandom(32)))

    async def sent(self, account: ChannelAccount | None = None) -> list[dict[str, Any]]:
        """The messages to the agent, in the order of the outbox, with their headers."""
        channel_id = str((account or self.account).id)
        rows = await self.platform.outbox("channel", "channel.inbound")
        return [body | {"headers": head} for head, body in rows if body["channel_id"] == channel_id]

    async def texts(self) -> list[str]:
        return [body["text"] for body in await self.sent()]


@pytest.fixture(scope="module")
async def prepared(platform: Platform) -> Platform:
    await platform.prepare("channel")
    return platform


@pytest.fixture
async def intake(prepared: Platform) -> AsyncIterator[Intake]:
    intake = Intake(prepared)
    yield intake
    async with intake.database.begin() as tx:
        await tx.sql("DELETE FROM accepted")


async def test_a_single_call_is_stored_in_its_conversation_directly(intake: Intake) -> None:
    await intake.accept(message(1), message(2), Ignored(("id/3",), "not a message"))
    assert await intake.texts() == ["text 1", "text 2"]
    assert (await intake.accepted(), await intake.ignored()) == (0, ["not a message"])


async def test_a_burst_is_accepted_first_and_drained_in_order_with_gapless_positions(intake: Intake) -> None:
    await intake.burst([message(n, conversation=f"c{n % 3}") for n in range(30)])
    assert (await intake.texts(), await intake.accepted()) == ([], 30)
    assert await intake.drainer.drain() == 30
    assert (await intake.drainer.drain(), await intake.accepted()) == (0, 0)
    for conversation in range(3):
        sent = [body for body in await intake.sent() if body["conversation_id"] == f"c{conversation}"]
        assert [body["text"] for body in sent] == [f"text {n}" for n in range(conversation, 30, 3)]
        assert [body["position"] for body in sent] == list(range(1, 11))
    facts = await intake.rows("SELECT 1 FROM event WHERE convert_from(data, 'UTF8') LIKE '%' || $1::uuid::text || '%'")
    assert len(facts) == 30


async def test_the_database_says_when_a_message_came(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    # The agent compares the time with that of its question, and its clock is another one.
    monkeypatch.setattr(module, "utcnow", lambda: utcnow() - timedelta(hours=1))
    await intake.accept(message("directly"))
    await intake.burst([message(n) for n in range(DRAIN_ROWS)])
    await intake.drainer.drain()
    times = {datetime.fromisoformat(body["received_at"]) for body in await intake.sent()}
    assert min(times) > utcnow() - timedelta(minutes=5)
    assert timedelta(0) < intake.ingest.backlog[intake.account.tenant_id] < timedelta(minutes=5)


async def test_a_call_does_not_overtake_accepted_messages(intake: Intake) -> None:
    await intake.burst([message(n) for n in range(20)])
    await intake.accept(message("late"))
    assert await intake.accepted() == 21
    await intake.drainer.drain()
    assert await intake.texts() == [*(f"text {n}" for n in range(20)), "text late"]


async def test_calls_ask_where_they_go_only_if_nothing_waits(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    directly = intake.ingest._store_directly

    async def counted(arrivals: Any) -> bool:
        nonlocal asked
        asked += 1
        return await directly(arrivals)

    monkeypatch.setattr(intake.ingest, "_store_directly", counted)
    await intake.burst([message(n) for n in range(20)])
    await intake.accept(message(20))
    assert (asked, await intake.accepted()) == (0, 21)
    assert await intake.drainer.drain() == 21
    await intake.accept(message(21))
    assert (asked, await intake.texts()) == (1, [f"text {n}" for n in range(22)])


async def test_a_repeat_changes_nothing_before_and_after_the_drain(intake: Intake) -> None:
    items = [message(n) for n in range(15)]
    await intake.burst([*items, *items])
    await intake.burst(items)
    assert await intake.accepted() == 15
    await intake.drainer.drain()
    await intake.burst(items)
    await intake.accept(items[3])
    assert await intake.accepted() == 0
    assert sorted(await intake.texts()) == sorted(item.text for item in items)


async def test_a_message_is_a_repeat_under_each_of_its_ids(intake: Intake) -> None:
    items = [message(n, ids=(f"event/{n}", f"message/{n // 2}")) for n in range(24)]
    await intake.burst(items)
    # Its own id is new, its other id is known, and the row of the own id is stored.
    await intake.accept(message("again", ids=("event/100", "message/5")), message("other", ids=("event/100", "x")))
    await intake.drainer.drain()
    assert await intake.texts() == [f"text {n}" for n in range(0, 24, 2)]


async def test_two_drainers_keep_the_order_and_store_each_message_once(intake: Intake) -> None:
    texts = [f"text {n}" for n in range(900)]
    await intake.burst([message(n) for n in range(900)])
    other = intake.another()
    drained = await asyncio.gather(intake.drainer.drain(), other.drain(), other.drain(), intake.drainer.drain())
    while await intake.accepted():
        await other.drain()
    assert sum(drained) <= 900
    sent = await intake.sent()
    assert [body["text"] for body in sent] == texts
    assert [body["position"] for body in sent] == list(range(1, 901))


async def test_the_drainer_runs_until_it_is_stopped(intake: Intake) -> None:
    drainer = Drainer(intake.ingest)
    running = asyncio.create_task(drainer.run())

    async def drained() -> bool:
        return await intake.accepted() == 0

    for start in (0, 700):
        await intake.burst([message(n) for n in range(start, start + 700)])
        await intake.platform.until(drained)
    await drainer.stop()
    await running
    assert await intake.texts() == [f"text {n}" for n in range(1_400)]


async def test_of_the_calls_of_one_turn_each_gets_its_own_answer(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, token = "whsec_" + base64.b64encode(bytes(32)).decode(), new_token()
    receive = Webhook.receive

    def checked(vendor: Webhook, request: Request, credentials: WebhookCredentials, now: datetime) -> Received:
        if b"fault" in request.body:
            raise RuntimeError("a fault of ours")
        return receive(vendor, request, credentials, now)

    monkeypatch.setattr(Webhook, "receive", checked)
    accounts = Accounts(intake.database, AccountSecrets(Cipher(MASTER_KEY)))
    account = intake.account._replace(credentials=WebhookCredentials(secret, "http://127.0.0.1/"))
    accounts._known[token] = time.monotonic() + 60, account
    take = Webhooks(accounts, intake.ingest, Metrics(CollectorRegistry()), Outgoing(allow_private=False), "")
    answers: dict[str, int] = {}

    def call(text: str, path: str = token, key: str = secret) -> None:
        body = (
            text.encode()
            if text == "no JSON"
            else msgspec.json.encode({"conversation_id": "c", "user_id": "u", "text": text})
        )
        request = SimpleNamespace(
            method="POST",
            scheme="http",
            path=f"/webhooks/webhook/{path}",
            query="",
            body=body,
            headers=webhooks.sign(key, f"msg_{text}", utcnow(), body),
            answer=lambda response: answers.update({text: response.status_code if response else 200}),
        )
        take(cast(RawRequest, request))

    call("forged", key="whsec_" + base64.b64encode(b"another" * 5).decode())
    call("good")
    call("fault")
    call("no JSON")
    call("lost", path=new_token())
    call("good too")
    async with asyncio.timeout(10):
        while len(answers) < 6:
            await asyncio.sleep(0.01)
    assert answers == {"forged": 401, "good": 200, "fault": 500, "no JSON": 400, "lost": 404, "good too": 200}
    assert await intake.texts() == ["good", "good too"]


async def test_the_keys_of_a_vendor_are_read_for_the_tenant_of_the_channel(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outgoing request takes a place of the tenant's share, so it must be counted for the right one."""
    whose: list[str] = []

    async def keys(*_: object) -> dict[str, object]:
        whose.extend((shares.tenant.get(), logs._work.get()["for_tenant"]))
        raise Transient("the vendor is away")

    token, answered = new_token(), asyncio.Event()
    vendor = intake.account.vendor
    monkeypatch.setattr(type(vendor), "needs_keys", lambda *_: True)
    monkeypatch.setattr(type(vendor), "keys", keys)
    accounts = Accounts(intake.database, AccountSecrets(Cipher(MASTER_KEY)))
    accounts._known[token] = time.monotonic() + 60, intake.account
    take = Webhooks(accounts, intake.ingest, Metrics(CollectorRegistry()), Outgoing(allow_private=False), "")
    request = SimpleNamespace(
        method="POST",
        scheme="http",
        path=f"/webhooks/{intake.account.vendor.name}/{token}",
        query="",
        body=b"{}",
        headers={},
        answer=lambda _: answered.set(),
    )
    take(cast(RawRequest, request))
    async with asyncio.timeout(10):
        await answered.wait()
    assert whose == [intake.account.tenant_id] * 2


async def test_the_drainer_pauses_less_the_longer_messages_have_waited(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0.0
    pauses: list[float] = []
    waited = iter([0, 1, 2.5, 4, 5, 9])

    async def drain() -> int:
        nonlocal clock
        clock += 0.1
        intake.ingest.accepted.set()
        if (seconds := next(waited, None)) is None:
            await intake.drainer.stop()
            return 0
        intake.ingest.backlog = {"one": timedelta(0), "two": timedelta(seconds=seconds), "three": timedelta(0)}
        return DRAIN_ROWS

    async def pause(seconds: float) -> None:
        pauses.append(round(seconds, 2))

    monkeypatch.setattr(drainer, "time", SimpleNamespace(monotonic=lambda: clock))
    monkeypatch.setattr(drainer, "asyncio", SimpleNamespace(sleep=pause))
    intake.drainer = Drainer(intake.ingest)
    monkeypatch.setattr(intake.drainer, "drain", drain)
    await intake.drainer.run()
    # Up to four times as long as the transaction took; not at all after five seconds.
    assert pauses == [0.4, 0.32, 0.2, 0.08, 0, 0]


async def test_calls_are_refused_while_accepted_messages_wait_too_long(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BACKLOG", timedelta(0))
    await intake.burst([message(n) for n in range(2 * DRAIN_ROWS)])
    await intake.accept(message("before"))
    assert await intake.drainer.drain() == DRAIN_ROWS
    with pytest.raises(Transient, match="wait too long"):
        await intake.accept(message("refused"))
    assert await intake.accepted() == DRAIN_ROWS + 1
    assert (await intake.drainer.drain(), await intake.drainer.drain()) == (DRAIN_ROWS, 1)
    await intake.accept(message("after"))
    assert (await intake.texts())[-2:] == ["text before", "text after"]


async def test_the_accepted_messages_of_an_erased_person_are_dropped_by_the_drainer(intake: Intake) -> None:
    await intake.burst([message(n, person=f"p{n % 2}") for n in range(20)])
    async with intake.database.begin() as tx:
        await destroy(tx, intake.account.tenant_id, intake.account.pseudonyms.subject("p1"))
    await intake.drainer.drain()
    assert await intake.texts() == [f"text {n}" for n in range(0, 20, 2)]
    assert await intake.ignored() == ["the author was erased"] * 10
    assert [body["position"] for body in await intake.sent()] == list(range(1, 11))


async def test_a_part_of_an_album_that_mentions_the_bot_makes_its_other_parts_count(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALBUM_WAITS", timedelta(0))
    intake.account = intake.account._replace(groups="mentions")

    def part(n: int, album: str, *, mentions_bot: bool = False) -> Inbound:
        return message(n)._replace(in_group=True, in_album=True, album=album, mentions_bot=mentions_bot)

    await intake.accept(part(1, "album/1"))
    await intake.accept(part(2, "album/2"))
    await intake.accept(part(3, "album/1", mentions_bot=True), part(4, "album/1", mentions_bot=True))
    await intake.drainer.drain()
    await intake.accept(part(5, "album/1"), part(1, "album/1"))
    await intake.drainer.drain()
    assert await intake.texts() == ["text 1", "text 3", "text 4", "text 5"]
    assert sorted(await intake.ignored()) == [
        "a part of an album of a group that is not for the bot",
        "the id of an album that is for the bot",
    ]
    assert await intake.accepted() == 0


async def test_a_command_in_an_album_names_the_agent_of_all_its_parts(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALBUM_WAITS", timedelta(0))
    sales = uuid7()
    intake.account = intake.account._replace(routes=(Route(sales, command="sales"),))

    def part(n: int, text: str, album: str = "album/1") -> Inbound:
        return message(n)._replace(text=text, attachments=(Attachment("image", f"f{n}"),), in_album=True, album=album)

    photos = [part(1, ""), part(2, "/sales which one?"), part(3, ""), part(4, "hello", "album/2")]
    for one in photos:
        await intake.accept(one)
    await intake.drainer.drain()
    # The vendor repeats a part.
    await intake.accept(photos[1], part(5, ""))
    await intake.drainer.drain()
    facts = await intake.rows(
        """
        SELECT convert_from(data, 'UTF8')::jsonb ->> 'agent_id', count(*) FROM event
        WHERE convert_from(data, 'UTF8')::jsonb ->> 'channel_id' = $1::uuid::text GROUP BY 1
        """
    )
    assert dict(facts) == {str(sales): 4, str(intake.account.agent_id): 1}
    assert (await intake.ignored(), await intake.accepted()) == (["the agent of an album"], 0)


async def test_the_parts_of_an_album_are_drained_as_soon_as_they_have_waited(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ALBUM_WAITS", timedelta(milliseconds=50))
    monkeypatch.setattr(drainer, "DRAIN_POLL_SECONDS", 600.0)
    intake.account = intake.account._replace(groups="replies")
    running = asyncio.create_task(intake.drainer.run())
    part = message(1)._replace(in_group=True, in_album=True, album="album/1", replies_to_bot=True)
    await intake.accept(part, part._replace(ids=("id/2",), replies_to_bot=False))

    async def drained() -> bool:
        return await intake.accepted() == 0

    await intake.platform.until(drained)
    await intake.drainer.stop()
    await running
    assert len(await intake.sent()) == 2


async def test_a_message_that_cannot_be_drained_lets_the_others_pass_and_is_tried_again(intake: Intake) -> None:
    await intake.burst([message(n) for n in range(20)])
    hash_ = dedupe_hash(intake.account.id, "id/7")
    async with intake.database.begin() as tx:
        [(sealed,)] = await tx.sql("SELECT sealed FROM accepted WHERE hash = $1", hash_)
        await tx.sql("UPDATE accepted SET sealed = 'damaged' WHERE hash = $1", hash_)
    await intake.drainer.drain()
    assert await intake.texts() == [f"text {n}" for n in range(20) if n != 7]
    [(attempts, waits)] = await intake.rows("SELECT attempts, retry_at > now() FROM accepted WHERE channel_id = $1")
    assert (attempts, waits) == (1, True)
    # It does not block the direct way either.
    await intake.accept(message("late"))
    assert (await intake.texts())[-1] == "text late"
    async with intake.database.begin() as tx:
        await tx.sql(
            "UPDATE accepted SET sealed = $2, retry_at = now() - interval '1 s' WHERE hash = $1", hash_, sealed
        )
    assert await intake.drainer.drain() == 1
    assert (await intake.texts())[-1] == "text 7"


async def test_a_message_carries_the_trace_of_its_call_through_the_accepted_row(intake: Intake) -> None:
    async def call(n: int) -> None:
        await intake.accept(message(n), traceparent=f"00-{n + 1:032x}-{n + 1:016x}-01")

    await asyncio.gather(*(call(n) for n in range(20)))
    await intake.drainer.drain()
    for body in await intake.sent():
        n = int(body["vendor_message_id"])
        assert body["headers"]["traceparent"] == f"00-{n + 1:032x}-{n + 1:016x}-01"


async def test_accepted_rows_show_no_personal_content(intake: Intake) -> None:
    await intake.burst([message(f"secret {n}", conversation="secret", person="secret") for n in range(20)])
    rows = await intake.rows("SELECT accepted::text, sealed FROM accepted WHERE channel_id = $1")
    assert len(rows) == 20
    assert not [row for row, sealed in rows if "secret" in row or b"secret" in sealed]


async def test_the_items_and_bytes_that_wait_are_bounded_and_each_tenant_has_a_share(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 20 * ITEM_BYTES)
    ingest = Ingest(intake.database, intake.ingest.cipher, intake.ingest.subjects)
    account, other = intake.account, intake.sibling()

    def accept(account: ChannelAccount, first: int, items: int, size: int = 0) -> asyncio.Future[None]:
        return ingest.accept(account, [message(first + n) for n in range(items)], None, size)

    waiting = [accept(account, 0, 4), accept(account, 4, 1, 5 * ITEM_BYTES)]
    for items, size in ((1, 0), (8, 0)):
        with pytest.raises(Transient, match="too many"):
            accept(account, 5, items, size)
    waiting += [accept(other, 0, 4)]
    await asyncio.gather(*waiting)
    await accept(account, 5, 10)
    with pytest.raises(Transient, match="too many"):
        accept(account, 15, 11)
    await Drainer(ingest).drain()
    assert await intake.texts() == [f"text {n}" for n in range(15)]


async def test_a_refused_message_does_not_keep_its_share(intake: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2 * ITEM_BYTES)
    intake.ingest = Ingest(intake.database, intake.ingest.cipher, intake.ingest.subjects)
    for n in range(3):
        with pytest.raises(TooLarge):
            await intake.accept(message(n)._replace(text="x" * MAX_MESSAGE_BYTES))
    await intake.accept(message(4))
    assert await intake.texts() == ["text 4"]


async def test_a_call_has_a_most_of_items_and_a_large_one_does_not_delay_others_in_its_statement(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TooLarge, match=f"must have at most {MAX_ITEMS}"):
        await intake.accept(*(message(n) for n in range(MAX_ITEMS + 1)))
    groups: list[int] = []
    accept = intake.ingest._accept

    async def counted(arrivals: Any) -> None:
        groups.append(len(arrivals))
        await accept(arrivals)

    monkeypatch.setattr(intake.ingest, "_accept", counted)
    batch = [message(n) for n in range(1_000)]  # as WhatsApp sends it
    await asyncio.gather(intake.accept(*batch), intake.accept(*batch[:300]), intake.accept(*batch[300:600]))
    assert groups == [1_000, 300, 300]
    assert await intake.accepted() == 1_000


async def test_accepted_messages_are_drained_in_turns_by_tenant(intake: Intake) -> None:
    others = [intake.sibling() for _ in range(3)]
    await intake.burst([message(n) for n in range(4 * DRAIN_ROWS)])
    for account in others:
        await intake.ingest.accept(account, [message(n) for n in range(10)])
    assert await intake.drainer.drain() == DRAIN_ROWS
    assert await intake.texts() == [f"text {n}" for n in range(DRAIN_ROWS - 30)]
    for account in others:
        sent = await intake.sent(account)
        assert [body["text"] for body in sent] == [f"text {n}" for n in range(10)]
        assert [body["position"] for body in sent] == list(range(1, 11))
    assert list(intake.ingest.backlog) == [intake.account.tenant_id]


async def test_only_the_calls_of_the_tenant_whose_messages_wait_too_long_are_refused(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BACKLOG", timedelta(0))
    other = intake.sibling()
    await intake.burst([message(n) for n in range(2 * DRAIN_ROWS)])
    await intake.ingest.accept(other, [message(1)])
    await intake.drainer.drain()
    with pytest.raises(Transient, match="wait too long"):
        await intake.accept(message("refused"))
    await intake.ingest.accept(other, [message(2)])
    await intake.drainer.drain()
    assert [body["text"] for body in await intake.sent(other)] == ["text 1", "text 2"]


async def test_a_conversation_that_got_another_id_keeps_its_session(intake: Intake) -> None:
    await intake.accept(message(1, conversation="-500"))
    moved = Moved(("id/m",), "-500", "-100500")
    for ids in (("id/m",), ("id/n",)):
        await intake.accept(moved._replace(ids=ids))
    await intake.burst([message(n, conversation="-100500") for n in range(2, 22)])
    await intake.drainer.drain()
    await intake.accept(message(22, conversation="-100500"))
    await intake.accept(message(23, conversation="-100500/7")._replace(parent="-100500"))
    *sent, thread = await intake.sent()
    assert thread["parent_session_key"] == sent[0]["session_key"]
    assert len({body["session_key"] for body in sent}) == 1
    assert [body["position"] for body in sent] == list(range(1, 23))
    assert {body["conversation_id"] for body in sent[1:]} == {"-100500"}
    assert await intake.ignored() == ["the conversation got another id"] * 2


async def test_a_thread_names_the_session_of_its_channel(intake: Intake) -> None:
    await intake.accept(message(1, conversation="C"), message(2, conversation="C/1")._replace(parent="C"))
    channel, thread = await intake.sent()
    assert thread["parent_session_key"] == channel["session_key"] != thread["session_key"]
    assert channel["parent_session_key"] == ""


async def test_requests_at_the_same_moment_share_one_query_of_their_account(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Accounts(intake.database, AccountSecrets(Cipher(MASTER_KEY)))
    reads = 0
    autocommit = intake.database.autocommit

    async def counted(statement: str, *arguments: Any) -> Sequence[tuple[Any, ...]]:
        nonlocal reads
        reads += 1
        return await autocommit(statement, *arguments)

    monkeypatch.setattr(intake.database, "autocommit", counted)
    token = new_token()
    found = await asyncio.gather(*(stored.by_token("webhook", token) for _ in range(50)))
    assert (found, reads) == ([None] * 50, 1)


async def test_only_an_account_that_needs_no_query_is_taken_from_the_cache(
    intake: Intake,
) -> None:
    stored = Accounts(intake.database, AccountSecrets(Cipher(MASTER_KEY)))
    token, other = new_token(), new_token()
    stored._known[token] = time.monotonic() + 60, intake.account
    stored._known[other] = time.monotonic() - 1, intake.account
    assert stored.cached("webhook", token) is intake.account
    for type_, text in (("slack", token), ("webhook", other), ("webhook", new_token()), ("webhook", token + "x")):
        assert stored.cached(type_, text) is None


async def test_an_unknown_token_costs_one_query_in_seconds_and_text_that_is_no_token_none(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Accounts(intake.database, AccountSecrets(Cipher(MASTER_KEY)))
    reads: list[str] = []
    read = stored._read

    async def counted(token: str) -> ChannelAccount | None:
        reads.append(token)
        return await read(token)

    monkeypatch.setattr(stored, "_read", counted)
    token = new_token()
    for _ in range(20):
        assert await stored.by_token("webhook", token) is None
    for text in ("", "unknown", token + "x", token[:-1] + "é", token + "\n"):
        assert await stored.by_token("webhook", text) is None
    assert len(reads) == 1
    monkeypatch.setattr(accounts, "CACHE_SIZE", 5)
    for _ in range(20):
        assert await stored.by_token("webhook", new_token()) is None
    assert len(reads) == 21
    assert len(stored._unknown) <= 5
    monkeypatch.setattr(accounts, "UNKNOWN_SECONDS", -1.0)
    for _ in range(2):
        assert await stored.by_token("webhook", token) is None
    assert len(reads) == 23
