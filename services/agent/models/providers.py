"""The models of providers: chat completions of any server that has OpenAI's API, and Anthropic's models."""

from __future__ import annotations

from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2

from services.agent.models.chat import TIMEOUT, ChatModel
from services.agent.models.completions import Completions
from services.agent.models.contract import Model, ModelEndpoint
from services.agent.models.pieces import ShortErrors, WholeEvents


class Providers:
    """The models of providers, called over one guarded transport."""

    def __init__(self, transport: httpx2.AsyncBaseTransport) -> None:
        transport = ShortErrors(transport)
        self._completions = Completions(transport)
        self._client = httpx2.AsyncClient(
            transport=WholeEvents(transport),
            timeout=TIMEOUT,
            trust_env=False,
            # No cookies are kept, because tenants share the client.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    async def close(self) -> None:
        await self._client.aclose()

    @lru_cache(maxsize=256)  # noqa: B019 - as long as the process, as this object
    def model(self, name: str, endpoint: ModelEndpoint) -> Model:
        """`name`: ``<family>/<the provider's model name>``, any family except ``scripted``."""
        family, _, own_name = name.partition("/")
        if family == "anthropic":
            # Imported here: `Models` has a thread that imports it first.
            from services.agent.models.claude import claude

            return claude(name, endpoint, self._client)
        return ChatModel(name, own_name, endpoint, self._completions)
