"""One tenant never holds all places: not those of connections, and not those of look-ups."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from infra.errors import Transient
from infra.outgoing import client, shares
from infra.outgoing.shares import Shares
from tests.infra.outgoing.test_client import Resolver, outgoing, resolver, serving

__all__ = ["resolver"]


async def taken(places: Shares, tenant: str, wanted: int) -> int:
    """Takes places, and returns how many the tenant gets without waiting."""
    for n in range(wanted):
        try:
            async with asyncio.timeout(0.01):
                await places.take(tenant)
        except TimeoutError:
            return n
    return wanted


async def test_one_gets_half_two_a_third_each_and_one_place_is_left_for_the_next() -> None:
    places = Shares(12)
    assert [await taken(places, tenant, 12) for tenant in ("a", "b", "c")] == [6, 3, 2]
    assert await taken(places, "d", 1) == 1


async def test_who_waits_gets_the_place_that_becomes_free_in_turn() -> None:
    places = Shares(4)
    got: list[int] = []

    async def wait(n: int) -> None:
        await places.take("a")
        got.append(n)

    assert await taken(places, "a", 4) == 2
    first, gone, last = [asyncio.create_task(wait(n)) for n in range(3)]
    await asyncio.sleep(0)
    gone.cancel()
    places.give("a")
    await first
    places.give("a")
    await last
    assert got == [0, 2]
    assert places._waiting == {}


async def test_tenants_that_wait_get_places_in_turns() -> None:
    places = Shares(1)
    got: list[str] = []

    async def hold(tenant: str) -> None:
        async with places.place(tenant):
            got.append(tenant)
            await asyncio.sleep(0)

    await asyncio.gather(*(hold(tenant) for tenant in "aaaaaabbc"))
    assert "".join(got) == "aabcabaaa"
    assert places._waiting == {}


async def test_a_place_that_comes_as_its_taker_is_cancelled_is_not_lost() -> None:
    places = Shares(2)
    await places.take("a")
    waits = asyncio.create_task(places.take("a"))
    await asyncio.sleep(0)
    places.give("a")
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert (places._free, places._held) == (2, {})


async def silent(_: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def test_a_tenant_whose_server_says_nothing_does_not_take_the_connections_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "CONNECTIONS", 8)
    async with serving(silent) as hoarder, serving() as server, outgoing() as http:
        shares.tenant.set("hoarder")
        hoarding = [asyncio.create_task(http.request("GET", hoarder.url, timeout=30)) for _ in range(20)]
        await asyncio.sleep(0.2)
        assert len(hoarder.heads) == 4
        with pytest.raises(Transient):
            await http.request("GET", server.url, timeout=0.1)
        shares.tenant.set("other")
        assert (await http.request("GET", server.url, timeout=5)).body == b"ok"
        for one in hoarding:
            one.cancel()
        await asyncio.gather(*hoarding, return_exceptions=True)
        shares.tenant.set("hoarder")
        assert (await http.request("GET", server.url, timeout=5)).body == b"ok"


async def test_a_place_is_given_back_however_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "CONNECTIONS", 2)
    long = b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + bytes(5_000)
    broken = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc"
    async with outgoing() as http:
        for answer in (long, broken, b"no HTTP\r\n\r\n", silent):
            async with serving(answer) as server:
                with pytest.raises(Exception, match=r"limit|127\.0\.0\.1"):
                    await http.request("GET", server.url, timeout=0.2, max_bytes=1_000)
        async with serving() as server:
            async with http.client() as library, library.stream("GET", server.url):
                pass  # the body is not read
            assert (await http.request("GET", server.url, timeout=5)).body == b"ok"


async def test_slow_name_servers_of_a_tenant_do_not_stop_others(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, looked_up = threading.Event(), resolver.__call__

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        if host == "slow.example":
            hangs.wait(10)
        return looked_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver.answers = {"slow.example": [["127.0.0.1"]], "fast.example": [["127.0.0.1"]]}
    async with serving() as server, outgoing() as http:
        shares.tenant.set("hoarder")
        for _ in range(client.LOOKUPS):
            # A time-out ends the request and not the thread.
            with pytest.raises(Transient):
                await http.request("GET", f"http://slow.example:{server.port}/", timeout=0.01)
        shares.tenant.set("other")
        url = f"http://fast.example:{server.port}/"
        assert (await http.request("GET", url, timeout=5)).body == b"ok"
        await asyncio.wait_for(asyncio.to_thread(str), 5)
        hangs.set()
        shares.tenant.set("hoarder")
        assert (await http.request("GET", url, timeout=5)).body == b"ok"
