"""How a missing answer of a vendor is classified, with and without an idempotency key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.errors import EffectFailed, NotYet, TooManyRequests, Transient, Unanswered
from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.cache import Cache
from infra.stores.objects import Objects
from services.channel.accounts.store import AccountSecrets, ChannelAccount
from services.channel.deliveries import sender as sender_module
from services.channel.deliveries.sender import Sender
from services.channel.domain import Pseudonyms
from services.channel.vendors import VENDORS
from services.channel.vendors.base import MAX_FILE, AccountRefused, Outbound, OutboundFile
from tooling.testing.platform import MASTER_KEY
from tooling.testing.stack import Stack
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn, WhatsAppStandIn, answer, cut, hold

PART = Outbound("key", "42", "hello")
# No file of these tests lies in it.
NO_STORE = Objects("http://127.0.0.1:9", "", "")


PNG = b"\x89PNG\r\n\x1a\n"


def account(vendor: TelegramStandIn | WebhookStandIn | WhatsAppStandIn) -> ChannelAccount:
    kind = VENDORS[type(vendor).__name__.removesuffix("StandIn").lower()]
    credentials = kind.credentials(**vendor.credentials)
    return ChannelAccount(uuid7(), "tenant", kind, uuid7(), credentials, Pseudonyms(b""), vendor.url, True, None)


@pytest.fixture
async def cache(stack: Stack) -> AsyncIterator[Cache]:
    redis = Redis.from_url(stack.redis_url)
    yield Cache(redis)
    await redis.aclose()


async def send(cache: Cache, to: ChannelAccount, *, allow_private: bool = True) -> None:
    cipher = Cipher(MASTER_KEY)
    outgoing = Outgoing(allow_private=allow_private)
    try:
        await Sender(AccountSecrets(cipher), SubjectKeys(cipher), outgoing, cache, NO_STORE, "").send(to, PART)
    finally:
        await outgoing.close()


async def test_a_missing_answer_is_transient_with_a_key_and_unknown_without(cache: Cache) -> None:
    async with WebhookStandIn() as keyed, TelegramStandIn() as once:
        for vendor, error in ((keyed, Transient), (once, Unanswered)):
            vendor.faults.append(cut(accept=True))
            with pytest.raises(error):
                await send(cache, account(vendor))


async def test_a_private_address_is_not_called_and_fails(cache: Cache) -> None:
    async with WebhookStandIn() as vendor:
        with pytest.raises(EffectFailed):
            await send(cache, account(vendor), allow_private=False)
        assert vendor.calls == 0


async def test_a_message_over_the_vendors_rate_limit_waits_before_it_is_sent(cache: Cache) -> None:
    async with TelegramStandIn() as vendor:
        to = account(vendor)
        await send(cache, to)
        with pytest.raises(TooManyRequests):
            await send(cache, to)
        assert vendor.calls == 1


FILE = PART._replace(text="the link", file=OutboundFile("", ""))


async def send_file(cache: Cache, to: ChannelAccount, url: str, name: str = "", *, allow_private: bool = True) -> None:
    cipher = Cipher(MASTER_KEY)
    outgoing = Outgoing(allow_private=allow_private)
    sender = Sender(AccountSecrets(cipher), SubjectKeys(cipher), outgoing, cache, NO_STORE, "")
    try:
        await sender.send(to, FILE._replace(key=str(uuid7()), file=OutboundFile(url, name)))
    finally:
        await outgoing.close()


async def test_a_file_is_judged_by_its_content_and_named(cache: Cache) -> None:
    async with WebhookStandIn() as vendor:
        vendor.files |= {"/a.txt": PNG, "/b%20c": b"%PDF-1.7", "/d": b"hi"}
        for path, name in (("/a.txt", "x/y.txt"), ("/b%20c", ""), ("/d", "d")):
            await send_file(cache, account(vendor), f"{vendor.url}{path}", name)
        [attachments] = zip(*(one.fields["attachments"] for one in vendor.ledger), strict=True)
        assert [(one["name"], one["content_type"]) for one in attachments] == [
            ("y.txt", "image/png"),
            ("b c.pdf", "application/pdf"),
            ("d.txt", "text/plain"),
        ]


async def test_a_file_that_the_vendor_does_not_take_is_sent_as_a_link(cache: Cache) -> None:
    async with WebhookStandIn() as host, WhatsAppStandIn() as whatsapp:
        host.files |= {"/large": PNG + b"x" * MAX_FILE, "/page.html": b"<html>", "/a.png": PNG + b"x" * 5_000_000}
        for path in host.files:
            await send_file(cache, account(whatsapp), f"{host.url}{path}")
        assert whatsapp.texts() == ["the link"] * 3


async def test_a_file_that_cannot_be_fetched_is_refused_and_the_vendor_not_called(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "PAUSES", (0, 0))
    async with WebhookStandIn() as host, TelegramStandIn() as vendor:
        host.files["/empty"] = b""
        host.files["/broken.zip"] = b"PK\x03\x04"
        for path, reason in (("/empty", "empty"), ("/none", "HTTP 404"), ("/broken.zip", "damaged")):
            with pytest.raises(EffectFailed, match=reason):
                await send_file(cache, account(vendor), f"{host.url}{path}")
        # It says nothing about the account.
        host.faults.append(answer(401))
        with pytest.raises(EffectFailed, match="the file could not be fetched: HTTP 401") as refused:
            await send_file(cache, account(vendor), f"{host.url}/a")
        assert not isinstance(refused.value, AccountRefused)
        host.faults.extend([answer(503, retry_after="9"), cut(accept=False), answer(500)])
        with pytest.raises(EffectFailed, match="HTTP 500"):
            await send_file(cache, account(vendor), f"{host.url}/a")
        calls = host.calls
        with pytest.raises(EffectFailed, match="not on the public internet"):
            await send_file(cache, account(vendor), f"{host.url}/a", allow_private=False)
        assert host.calls == calls
        assert vendor.calls == 0
        host.files["/a"] = b"text"
        host.faults.extend([answer(503), cut(accept=False)])
        await send_file(cache, account(vendor), f"{host.url}/a")
        assert vendor.texts() == ["[document a.txt]"]


async def test_a_tenant_has_two_files_in_memory_and_all_together_eight(cache: Cache) -> None:
    cipher, outgoing = Cipher(MASTER_KEY), Outgoing(allow_private=True)
    sender = Sender(AccountSecrets(cipher), SubjectKeys(cipher), outgoing, cache, NO_STORE, "")
    async with WebhookStandIn() as host, WebhookStandIn() as vendor:
        host.files["/a"] = b"text"
        part = FILE._replace(file=OutboundFile(f"{host.url}/a", ""))
        go_on = asyncio.Event()
        host.faults.extend([hold(go_on)] * 8)
        of_four = [account(vendor)._replace(tenant_id=f"tenant {n % 4}") for n in range(8)]
        sends = [asyncio.create_task(sender.send(to, part._replace(key=f"k{n}"))) for n, to in enumerate(of_four)]
        # Each has counted itself before its first wait.
        await asyncio.sleep(0)
        try:
            for tenant in ("tenant 0", "another"):
                with pytest.raises(NotYet):
                    await sender.send(account(vendor)._replace(tenant_id=tenant), part)
        finally:
            go_on.set()
            await asyncio.gather(*sends)
        await sender.send(of_four[0], part)
        assert len(vendor.ledger) == 9
    await outgoing.close()


async def test_the_files_of_one_tenant_do_not_stop_those_of_another(cache: Cache) -> None:
    cipher, outgoing = Cipher(MASTER_KEY), Outgoing(allow_private=True)
    sender = Sender(AccountSecrets(cipher), SubjectKeys(cipher), outgoing, cache, NO_STORE, "")
    async with WebhookStandIn() as host, WebhookStandIn() as slow, WebhookStandIn() as vendor:
        host.files["/a"] = slow.files["/a"] = b"text"
        part = FILE._replace(file=OutboundFile(f"{slow.url}/a", ""))
        go_on = asyncio.Event()
        slow.faults.extend([hold(go_on)] * 2)
        to = account(vendor)
        sends = [asyncio.create_task(sender.send(to, part._replace(key=f"k{n}"))) for n in range(2)]
        await asyncio.sleep(0)
        try:
            with pytest.raises(NotYet):
                await sender.send(to, part)
            other = FILE._replace(file=OutboundFile(f"{host.url}/a", ""))
            await sender.send(to._replace(tenant_id="another"), other)
        finally:
            go_on.set()
            await asyncio.gather(*sends)
    await outgoing.close()
