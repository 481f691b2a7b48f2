"""A campaign of random kills under load: an outside client with its own ledger, and a verdict at the end.

The client is a vendor of the type ``webhook`` that repeats each message until it is answered 200. Meanwhile services
and engines are killed with SIGKILL, at random moments from a seed. At the end every accepted message must have
exactly one reply, the replies of each conversation must be in the order of its messages, and the bill must agree with
the tokens that the fake model has reported.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
import msgspec

from tooling.testing.model_server import KEY, ModelServer
from tooling.testing.stack import Stack
from tooling.testing.system import Company, System, until
from tooling.testing.vendors import Accepted, WebhookStandIn

SERVICES = ("channel", "agent", "billing", "plugin", "memory", "user", "ws_gateway")
ENGINES = ("postgres", "kafka", "rabbitmq", "valkey")
MODEL = "gpt-4o-mini"
# Tokens that the fake model reports for each answer, and their price: 0.15 and 0.60 USD per million.
TOKENS_IN, TOKENS_OUT = 12, 5
PRICE_NANOS = TOKENS_IN * 150 + TOKENS_OUT * 600
CREDIT_NANOS = 10**12
CONVERSATIONS = 12
# Seconds between two messages of a conversation, and between two kills.
MESSAGE_PAUSE, KILL_PAUSE = (1.0, 5.0), (3.0, 9.0)
# The campaign gives up if no reply has come for this long after the last kill.
STALL_SECONDS = 120.0


class Kill(msgspec.Struct, frozen=True):
    """A process tree that got SIGKILL. `second`: since the begin of the campaign."""

    second: float
    target: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a campaign. Every list of faults is empty if all promises held."""

    seed: int
    seconds: float
    kills: list[Kill]
    accepted: int
    """Messages that were answered 200."""
    attempts: int
    """Webhook calls, with the repeats of those that failed."""
    failed_attempts: dict[str, int]
    """HTTP status, or the kind of transport error → number of webhook calls that ended so."""
    repeated_replies: int
    """Replies that came again under the same id, which the vendor dropped."""
    model_calls: int
    extra_model_calls: int
    """Calls beyond one per message: their answers were lost, so they were made and billed by estimate again."""
    slowest_seconds: float
    """The longest time from the 200 of a message to its reply."""
    lost: list[str]
    answered_twice: list[str]
    out_of_order: list[str]
    """Conversations whose replies are not in the order of their messages."""
    unexpected: list[str]
    """Replies that answer no message, such as an apology for a failed run."""
    bill: list[str]
    """Faults of the bill, in words."""

    @property
    def held(self) -> bool:
        return not (self.lost or self.answered_twice or self.out_of_order or self.unexpected or self.bill)


@dataclass
class Conversation:
    """One conversation with the client's ledger of it."""

    name: str
    accepted_at: dict[str, float] = field(default_factory=dict)
    """Texts that were answered 200, in their order → Unix seconds of the 200."""


class Campaign:
    """One campaign on a running system, whose processes are restarted by its supervisor."""

    def __init__(
        self, system: System, models: ModelServer, vendor: WebhookStandIn, seed: int, conversations: int = CONVERSATIONS
    ) -> None:
        self._system = system
        self._stack = Stack(system.home)
        self._models = models
        self._vendor = vendor
        self._seed = seed
        self._random = random.Random(seed)
        self._conversations = [Conversation(f"conversation-{n}") for n in range(conversations)]
        self._attempts = 0
        self._failed: Counter[str] = Counter()
        self._asked_before = 0
        self._kills: list[Kill] = []
        self._stopping = asyncio.Event()

    async def run(self, kills: int, tell: Callable[[str], None], targets: tuple[str, ...] = ()) -> Report:
        """Sends messages while `kills` processes are killed, waits for all replies, and judges.

        `tell` gets a line for each kill. `targets`: names of services and engines; all of them, if none is given.
        """
        began = time.time()
        async with self._system.company("Campaign", credit_nanos=CREDIT_NANOS) as company:
            path = await self._connect(company)
            self._asked_before = len(self._models.asked(MODEL))
            async with httpx.AsyncClient(base_url=self._system.base_url, trust_env=False, timeout=15) as client:
                senders = [asyncio.create_task(self._send(client, path, one)) for one in self._conversations]
                await self._kill(kills, targets or (*SERVICES, *ENGINES), began, tell)
                self._stopping.set()
                await asyncio.gather(*senders)
            tell("no more kills; waiting for the remaining replies")
            await self._all_answered()
            bill = await self._judge_bill(company)
        return self._report(began, bill)

    async def _connect(self, company: Company) -> str:
        """Makes agent and channel, and returns the webhook's path."""
        provider = {"base_url": self._models.url, "api_key": KEY}
        agent = await company.make(
            "/api/v1/agents",
            {
                "name": "Echo",
                "model": f"openai/{MODEL}",
                "provider": provider,
                "system_prompt": "Repeat.",
                "queue_mode": "followup",
            },
        )
        channel = await company.make(
            "/api/v1/channels",
            {"type": "webhook", "agent_id": agent["id"], "credentials": self._vendor.credentials},
        )
        return str(channel["webhook_path"])

    async def _send(self, client: httpx.AsyncClient, path: str, conversation: Conversation) -> None:
        number = 0
        while not self._stopping.is_set():
            text = f"{conversation.name} message {number}"
            number += 1
            body, headers = self._vendor.message(text, conversation=conversation.name, user=conversation.name)
            await self._accepted(client, path, body, headers)
            conversation.accepted_at[text] = time.time()
            pause = self._random.uniform(*MESSAGE_PAUSE)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    async def _accepted(self, client: httpx.AsyncClient, path: str, body: bytes, headers: dict[str, str]) -> None:
        """Sends the same call again and again until it is answered 200, as a vendor does."""
        while True:
            self._attempts += 1
            try:
                answer = await client.post(path, content=body, headers=headers)
            except httpx.TransportError as error:
                self._failed[type(error).__name__] += 1
            else:
                if answer.status_code == 200:
                    return
                assert answer.status_code in (429, 500, 502, 503, 504), answer.text
                self._failed[str(answer.status_code)] += 1
            await asyncio.sleep(0.3)

    async def _kill(self, count: int, targets: tuple[str, ...], began: float, tell: Callable[[str], None]) -> None:
        for number in range(count):
            await asyncio.sleep(self._random.uniform(*KILL_PAUSE))
            target = self._random.choice(targets)
            await asyncio.to_thread(self._stack.kill, target, signal.SIGKILL)
            self._kills.append(Kill(round(time.time() - began, 1), target))
            tell(f"kill {number + 1} of {count}: {target}")
        # Faults that need a while to show, such as a lease that expires, shall meet load too.
        await asyncio.sleep(KILL_PAUSE[1])

    async def _all_answered(self) -> None:
        """Returns when every accepted message has a reply, or after STALL_SECONDS without a new one."""
        due = sum(len(conversation.accepted_at) for conversation in self._conversations)
        seen, since = -1, time.monotonic()
        while (found := len(self._vendor.ledger)) < due:
            if found > seen:
                seen, since = found, time.monotonic()
            if time.monotonic() - since > STALL_SECONDS:
                return
            await asyncio.sleep(0.1)

    async def _judge_bill(self, company: Company) -> list[str]:
        """The faults of the bill. It is compared with the client's ledger and with the fake model's."""

        async def settled() -> dict[str, Any] | None:
            found = await company.get("/api/v1/billing/reconciliation")
            done = found["counted"] + found["duplicate"] + found["rejected"] + found["held"]
            return found if found["produced"] and found["produced"] == done and not found["pending"] else None

        try:
            await until(settled, seconds=STALL_SECONDS)
        except TimeoutError as error:
            return [f"the usage records are not settled: {error}"]
        found = await company.get("/api/v1/billing/reconciliation")
        usage = await company.all("/api/v1/billing/usage")
        ledger = await company.all("/api/v1/billing/ledger")
        balance = await company.get("/api/v1/billing/balance")
        accepted = sum(len(conversation.accepted_at) for conversation in self._conversations)
        answers = [row for row in usage if row["resource"] == f"openai/{MODEL}" and not row["estimated"]]
        estimates = [row for row in usage if row["estimated"]]
        charges = Counter(entry["usage_id"] for entry in ledger if entry.get("usage_id"))
        amount = sum(row["amount_nanos"] or 0 for row in usage)
        faults = {
            f"difference {found['difference']}, rejected {found['rejected']}, held {found['held']}": (
                found["difference"] or found["rejected"] or found["held"]
            ),
            f"{len(answers)} answers are billed for {accepted} messages": len(answers) != accepted,
            f"an answer is not billed at {PRICE_NANOS} nano-units": any(
                row["amount_nanos"] != PRICE_NANOS for row in answers
            ),
            f"{len(estimates)} estimates for {self._model_calls - accepted} extra calls of the model": (
                len(estimates) > self._model_calls - accepted
            ),
            "a usage record is charged twice": any(times > 1 for times in charges.values()),
            f"usage costs {amount}, the account was debited {balance['debited_nanos']}": (
                amount != balance["debited_nanos"]
            ),
            f"credit of {balance['held_nanos']} is still held": balance["held_nanos"],
        }
        return [text for text, wrong in faults.items() if wrong]

    @property
    def _model_calls(self) -> int:
        return len(self._models.asked(MODEL)) - self._asked_before

    def _report(self, began: float, bill: list[str]) -> Report:
        accepted = sum(len(conversation.accepted_at) for conversation in self._conversations)
        replies = judge_replies(self._conversations, self._vendor.ledger)
        return Report(
            seed=self._seed,
            seconds=round(time.time() - began, 1),
            kills=self._kills,
            accepted=accepted,
            attempts=self._attempts,
            failed_attempts=dict(self._failed),
            repeated_replies=self._vendor.repeats,
            model_calls=self._model_calls,
            extra_model_calls=self._model_calls - accepted,
            slowest_seconds=round(replies.slowest_seconds, 1),
            lost=replies.lost,
            answered_twice=replies.twice,
            out_of_order=replies.out_of_order,
            unexpected=replies.unexpected,
            bill=bill,
        )


class Replies(NamedTuple):
    """The faults of all replies, as in `Report`."""

    lost: list[str]
    twice: list[str]
    out_of_order: list[str]
    unexpected: list[str]
    slowest_seconds: float


def judge_replies(conversations: Sequence[Conversation], ledger: Sequence[Accepted]) -> Replies:
    """Compares the vendor's ledger with the client's."""
    found = Replies([], [], [], [], 0.0)
    slowest = 0.0
    for one in conversations:
        due = {f"You said: {text}": at for text, at in one.accepted_at.items()}
        replies = [reply for reply in ledger if reply.to == one.name]
        times = Counter(reply.text for reply in replies)
        first = {reply.text: reply.at for reply in reversed(replies)}
        found.lost.extend(text for text in due if text not in times)
        found.twice.extend(text for text in due if times[text] > 1)
        found.unexpected.extend(reply.text for reply in replies if reply.text not in due)
        in_order = sorted((text for text in due if text in first), key=first.__getitem__)
        if in_order != [text for text in due if text in first]:
            found.out_of_order.append(one.name)
        slowest = max([slowest, *(first[text] - at for text, at in due.items() if text in first)])
    names = {one.name for one in conversations}
    found.unexpected.extend(reply.text for reply in ledger if reply.to not in names)
    return found._replace(slowest_seconds=slowest)
