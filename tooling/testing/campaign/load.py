"""The clients of a campaign: tenants with vendors, people who write, and callers of the API; with their ledger.

``red`` has a channel of type ``webhook``, whose receiver drops repeats by their key. ``green`` has one of type
``telegram``, which takes no key. ``blue`` calls the API with idempotency keys, and has credit for few answers. Each has
a canary: a word that is in all of its texts and in no other tenant's.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx

from tooling.testing.campaign.evidence import TOOL_WORD, ModelCall, Reply, Sent
from tooling.testing.campaign.wires import Wires
from tooling.testing.model_server import KEY, Asked, ModelServer, Says
from tooling.testing.system import Company, System
from tooling.testing.until import until
from tooling.testing.vendors import TelegramStandIn, WebhookStandIn

MODEL = "gpt-4o-mini"
CREDIT_NANOS = 10**12
# An answer to blue has 1,000 tokens, which cost 0.60 USD for a million. So its credit is enough for six answers.
POOR_CREDIT_NANOS, LONG_ANSWER_TOKENS = 4_000_000, 1_000
CONVERSATIONS, API_MESSAGES = 8, 14
# Seconds between two messages of a conversation, and between two calls of the API.
MESSAGE_PAUSE, API_PAUSE = (1.0, 5.0), (0.5, 3.0)
RETRY_SECONDS = 0.3
# Within this time Slack wants an answer to its events: https://docs.slack.dev/apis/events-api
VENDOR_SECONDS = 3.0
# An answer that shows that the call can be made again.
AGAIN = (429, 500, 502, 503, 504)
# Every nth message of a conversation needs a tool, so that its run has two calls of the model.
TOOL_EVERY = 4
REPEATED, REPEATED_LATE, FORGED, SWAPPED = 0.3, 0.1, 0.1, 0.2

# Gives body and headers. A vendor that sends a message again signs it again, by the time of the new call.
Call = Callable[[], tuple[bytes, dict[str, str]]]
Vendor = WebhookStandIn | TelegramStandIn


@dataclass
class Tenant:
    """`vendor` and `path` are those of its channel; blue has none."""

    name: str
    company: Company
    canary: str
    agent: str = ""
    vendor: Vendor | None = None
    path: str = ""


class Load:
    """The clients. `run` sends until `stopping` is set.

    `duplicates`, `reorder`: the faults of that name. `wires`: proxies to go through; None for the direct way.
    """

    def __init__(
        self,
        system: System,
        models: ModelServer,
        seed: int,
        *,
        duplicates: bool,
        reorder: bool,
        conversations: int,
        wires: Wires | None,
    ) -> None:
        self._system = system
        self._models = models
        self._seed = seed
        self._duplicates = duplicates
        self._reorder = reorder
        self._conversations = conversations
        self._wires = wires
        self.tenants: dict[str, Tenant] = {}
        self.sent: list[Sent] = []
        self.attempts = 0
        self.failed: Counter[str] = Counter()
        """HTTP status, or the kind of transport error → calls that ended so."""
        self.forged = 0
        self.forged_accepted: list[str] = []
        self.asked_twice: list[str] = []
        """Messages for which the model was asked while it still kept the answer to the same question."""
        self.calls_of_model: list[ModelCall] = []
        self._kept: asyncio.Event | None = None
        self._unanswered: set[tuple[str, int]] = set()
        self.stopping = asyncio.Event()

    @asynccontextmanager
    async def prepared(self) -> AsyncIterator[None]:
        """Tenants, agents, channels and a document of each tenant, for the block."""
        async with AsyncExitStack() as stack:
            for name in ("red", "green", "blue"):
                credit = POOR_CREDIT_NANOS if name == "blue" else CREDIT_NANOS
                company = await stack.enter_async_context(self._system.company(name, credit_nanos=credit))
                self.tenants[name] = Tenant(name, company, f"canary{name}{secrets.token_hex(4)}")
            self._models.rules[MODEL] = self._answer
            self._gateway = await self._address("gateway", self._system.base_url)
            models = await self._address("models", self._models.url)
            for tenant in self.tenants.values():
                await self._furnish(tenant, models)
            for name, vendor in (("red", WebhookStandIn()), ("green", TelegramStandIn())):
                await self._connect(self.tenants[name], await stack.enter_async_context(vendor))
            yield
            self._models.rules.pop(MODEL)

    async def _address(self, wire: str, url: str) -> str:
        return await self._wires.lead(wire, url) if self._wires else url

    async def _furnish(self, tenant: Tenant, models: str) -> None:
        provider = {"base_url": models, "api_key": KEY}
        agent = await tenant.company.make(
            "/api/v1/agents",
            {
                "name": "Echo",
                "model": f"openai/{MODEL}",
                "provider": provider,
                "system_prompt": f"Repeat. {tenant.canary}",
                "queue_mode": "followup",
                "tools": ["calculator"],
            },
        )
        tenant.agent = agent["id"]
        text = f"# Aviary\n\nThe bird of this house is called {tenant.canary} and it sings.\n"
        files = {"file": ("aviary.md", text.encode(), "text/markdown")}
        answer = await tenant.company.api.post("/api/v1/documents", files=files)
        assert answer.status_code == 202, answer.text

        async def indexed() -> bool:
            found = await tenant.company.get(f"/api/v1/documents/{answer.json()['id']}")
            assert found["status"] != "failed", found
            return bool(found["status"] == "indexed")

        await until(indexed, seconds=120)

    async def _connect(self, tenant: Tenant, vendor: Vendor) -> None:
        tenant.vendor = vendor
        body: dict[str, Any] = {"agent_id": tenant.agent, "credentials": dict(vendor.credentials)}
        address = await self._address("vendors", vendor.url)
        if isinstance(vendor, WebhookStandIn):
            body["type"] = "webhook"
            body["credentials"]["reply_url"] = f"{address}/replies"
        else:
            body |= {"type": "telegram", "api_base": address}
        tenant.path = (await tenant.company.make("/api/v1/channels", body))["webhook_path"]

    def _answer(self, asked: Asked) -> Says:
        messages = asked.body["messages"]
        canaries = [tenant.name for tenant in self.tenants.values() if tenant.canary in str(messages)]
        # The request for a summary of a long conversation has no tools. Its text is the whole conversation.
        text = asked.last_user_text if "tools" in asked.body else ""
        # 2: it has a tool's answer.
        stage = 2 if messages[-1]["role"] == "tool" else 1
        self.calls_of_model.append(ModelCall(text, stage, canaries, time.time()))
        # Each request has its whole conversation, and the model keeps all requests: gigabytes after an hour.
        del messages[:]
        if not text:
            return Says("They greeted each other.")
        if f" {TOOL_WORD} " in text and stage == 1:
            says = Says(calls=(("calculator", '{"expression": "6*7"}'),))
        else:
            tokens = LONG_ANSWER_TOKENS if self.tenants["blue"].canary in text else 5
            says = Says(f"You said: {text}", usage=(12, 0, tokens, 0))
        return self._keeping((text, stage), says) if self._kept else says

    def _keeping(self, call: tuple[str, int], says: Says) -> Says:
        if call in self._unanswered:
            self.asked_twice.append(call[0])
        self._unanswered.add(call)
        return replace(says, waits=self._kept)

    @contextmanager
    def kept_answers(self) -> Iterator[None]:
        """The model keeps its answers until the end of the block, so runs that ask it meanwhile do not end before."""
        self._kept, self._unanswered = asyncio.Event(), set()
        try:
            yield
        finally:
            self._kept.set()
            self._kept = None

    async def run(self) -> None:
        async with httpx.AsyncClient(base_url=self._gateway, trust_env=False, timeout=15) as client:
            channels = [tenant for tenant in self.tenants.values() if tenant.vendor]
            await asyncio.gather(
                *(self._converse(client, channels[n % len(channels)], n) for n in range(1, self._conversations + 1)),
                self._call_api(client, self.tenants["blue"]),
            )

    async def _converse(self, client: httpx.AsyncClient, tenant: Tenant, n: int) -> None:
        chance = random.Random(f"{self._seed} conversation {n}")
        earlier: list[tuple[Sent, Call]] = []
        number = 0
        while not self.stopping.is_set():
            kind = TOOL_WORD if number % TOOL_EVERY == TOOL_EVERY - 1 else "message"
            texts = [f"c{n} {kind} {number} {tenant.canary}"]
            number += 1
            if self._reorder and chance.random() < SWAPPED:
                texts.insert(0, f"c{n} message {number} {tenant.canary}")
                number += 1
            for text in texts:
                call = _message(tenant, text, n)
                if chance.random() < FORGED:
                    await self._forge(client, tenant, n, number)
                sent = await self._accepted(client, tenant, f"{n}", text, call)
                if self._duplicates:
                    if chance.random() < REPEATED:
                        await asyncio.gather(*(self._repeat(client, tenant, sent, call) for _ in range(2)))
                    if earlier and chance.random() < REPEATED_LATE:
                        await self._repeat(client, tenant, *chance.choice(earlier))
                    earlier.append((sent, call))
            await self._pause(chance.uniform(*MESSAGE_PAUSE))

    async def _accepted(
        self, client: httpx.AsyncClient, tenant: Tenant, conversation: str, text: str, call: Call
    ) -> Sent:
        """Sends the message again and again until it is answered 200, as a vendor does."""
        began, first, calls = time.time(), 0.0, 0
        while True:
            calls += 1
            body, headers = call()
            status = await self._post(client, tenant.path, content=body, headers=headers)
            first = first or time.time() - began
            if status == 200:
                sent = Sent(
                    tenant=tenant.name,
                    conversation=conversation,
                    text=text,
                    at=time.time(),
                    seconds=first,
                    at_once=calls == 1,
                    calls=calls,
                )
                self.sent.append(sent)
                return sent
            await asyncio.sleep(RETRY_SECONDS)

    async def _repeat(self, client: httpx.AsyncClient, tenant: Tenant, sent: Sent, call: Call) -> None:
        body, headers = call()
        if await self._post(client, tenant.path, content=body, headers=headers) == 200:
            sent.repeats += 1

    async def _forge(self, client: httpx.AsyncClient, tenant: Tenant, n: int, number: int) -> None:
        """A call whose signature or secret is wrong. It must never be acknowledged."""
        text = f"c{n} forged {number} {tenant.canary}"
        body, headers = _message(tenant, text, n)()
        name = next(name for name in headers if "signature" in name or "secret" in name)
        self.forged += 1
        headers = headers | {name: "v1," + "A" * 43 + "="}
        if await self._post(client, tenant.path, also=(401, 403), content=body, headers=headers) == 200:
            self.forged_accepted.append(text)

    async def _call_api(self, client: httpx.AsyncClient, tenant: Tenant) -> None:
        chance = random.Random(f"{self._seed} api")
        for n in range(1, API_MESSAGES + 1):
            if self.stopping.is_set():
                return
            await self._ask(client, tenant, n, chance)
            await self._pause(chance.uniform(*API_PAUSE))

    async def _ask(self, client: httpx.AsyncClient, tenant: Tenant, n: int, chance: random.Random) -> None:
        """One call with an idempotency key, which is then repeated, and repeated with another body."""
        text, key, session = f"a{n} message {n} {tenant.canary}", secrets.token_hex(8), f"s{n}"
        path = f"/api/v1/agents/{tenant.agent}/sessions/{session}/messages"
        headers = {**tenant.company.api.headers, "idempotency-key": key}

        async def call(body: str) -> httpx.Response:
            while True:
                found = await self._answered(client, path, json={"text": body}, headers=headers)
                if found is not None and found.status_code not in AGAIN:
                    return found
                calls.append(body)
                await asyncio.sleep(RETRY_SECONDS)

        calls: list[str] = []
        began = time.time()
        answer = await call(text)
        assert answer.status_code == 202, answer.text
        sent = Sent(
            tenant=tenant.name,
            conversation=session,
            text=text,
            at=time.time(),
            seconds=time.time() - began,
            at_once=not calls,
            calls=len(calls) + 1,
            key=key,
            runs=[answer.json()["run_id"]],
        )
        self.sent.append(sent)
        await self._pause(chance.uniform(0, 1))
        for _ in range(2):
            again = await call(text)
            sent.repeats += 1
            sent.runs.append(again.json().get("run_id", f"HTTP {again.status_code}"))
        sent.other_body = (await call(f"{text} and more")).status_code

    async def _post(self, client: httpx.AsyncClient, path: str, also: tuple[int, ...] = (), **request: Any) -> int:
        """The status, 0 for none. Raises AssertionError for one that a vendor does not expect."""
        answer = await self._answered(client, path, **request)
        if answer is None:
            return 0
        assert answer.status_code in (200, *AGAIN, *also), answer.text
        return answer.status_code

    async def _answered(self, client: httpx.AsyncClient, path: str, **request: Any) -> httpx.Response | None:
        self.attempts += 1
        try:
            answer = await client.post(path, **request)
        except httpx.TransportError as error:
            self.failed[type(error).__name__] += 1
            return None
        if answer.status_code in AGAIN:
            self.failed[str(answer.status_code)] += 1
        return answer

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return

    def replies(self) -> list[Reply]:
        return [
            Reply(tenant.name, _number(tenant, accepted.to), accepted.text, accepted.at)
            for tenant in self.tenants.values()
            if tenant.vendor
            for accepted in tenant.vendor.ledger
        ]


def _message(tenant: Tenant, text: str, n: int) -> Call:
    """The vendor's webhook call for a message in the conversation with the number n."""
    if isinstance(tenant.vendor, WebhookStandIn):
        id_ = f"msg_{secrets.token_hex(12)}"
        return partial(tenant.vendor.message, text, conversation=f"conversation-{n}", user=f"person-{n}", id_=id_)
    assert isinstance(tenant.vendor, TelegramStandIn)
    update = tenant.vendor.update(text, chat=1000 + n, person=1000 + n)
    return lambda: update


def _number(tenant: Tenant, to: str) -> str:
    """The number of a conversation by the vendor's name of it."""
    return to.removeprefix("conversation-") if isinstance(tenant.vendor, WebhookStandIn) else str(int(to) - 1000)
