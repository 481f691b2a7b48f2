"""How a missing answer of a vendor is classified, with and without an idempotency key."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from infra.clock import uuid7
from infra.errors import EffectFailed, TooManyRequests, Transient, Unanswered
from infra.outgoing.client import Outgoing
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from infra.stores.cache import Cache
from services.channel.accounts import Account, Secrets
from services.channel.domain import Pseudonyms
from services.channel.sender import Sender
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Outbound
from tooling.testing.platform import MASTER_KEY
from tooling.testing.stack import Stack
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn, cut

PART = Outbound("key", "42", "hello")


def account(vendor: TelegramStandIn | WebhookStandIn) -> Account:
    kind = VENDORS["telegram" if isinstance(vendor, TelegramStandIn) else "webhook"]
    credentials = kind.credentials(**vendor.credentials)
    return Account(uuid7(), "tenant", kind, uuid7(), credentials, Pseudonyms(b""), vendor.url, True, None)


@pytest.fixture
async def cache(stack: Stack) -> AsyncIterator[Cache]:
    redis = Redis.from_url(stack.redis_url)
    yield Cache(redis)
    await redis.aclose()


async def send(cache: Cache, to: Account, *, allow_private: bool = True) -> None:
    cipher = Cipher(MASTER_KEY)
    outgoing = Outgoing(allow_private=allow_private)
    try:
        await Sender(Secrets(cipher), SubjectKeys(cipher), outgoing, cache).send(to, PART)
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
