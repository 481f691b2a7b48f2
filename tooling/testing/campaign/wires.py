"""The proxies of a campaign: each connection that has network faults leads through one."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

from tooling.testing.proxy import FaultProxy


class Wires:
    """Proxies by the name of their wire, such as ``vendors``. They end with `stack`."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.proxies: dict[str, list[FaultProxy]] = defaultdict(list)

    async def lead(self, wire: str, url: str) -> str:
        """Starts a proxy in front of the server of this URL. Returns the URL that leads through it."""
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        proxy = await self._stack.enter_async_context(FaultProxy(parts.hostname, parts.port))
        self.proxies[wire].append(proxy)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}").geturl()
