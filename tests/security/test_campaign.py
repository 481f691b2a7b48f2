"""Many tenants with words of their own, and calls of any route as any kind of client, for the things of any tenant.

Here a small sample. On demand, about half an hour:
``CLAW_RIGHTS_TENANTS=500 CLAW_RIGHTS_CALLS=100000 ./claw test tests/security/test_campaign.py``
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from typing import Any
from uuid import uuid4

import httpx
import pytest

from infra.security.auth import SCOPES
from infra.service.api import OPERATOR
from tests.security.clients import BODIES, OWN_NAMES, Clients
from tests.security.furnished import Furnished, furnish
from tests.security.pages import Operation, filled
from tooling.testing.platform import Platform
from tooling.testing.progress import Progress

TENANTS = int(os.environ.get("CLAW_RIGHTS_TENANTS", "3"))
CALLS = int(os.environ.get("CLAW_RIGHTS_CALLS", "400"))
SEED = int(os.environ.get("CLAW_RIGHTS_SEED", "1"))
# More at once would not be faster: two cores are busy with six.
FURNISHED_AT_ONCE = 6
# Until a run is over, a dead letter is stored, or an account is open, while other work fills the machine.
PATIENCE_SECONDS = 600.0
pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(300 + 10 * TENANTS + CALLS // 20)]

WORD = "Schilfrohrsaenger"
_WORDS = re.compile(rf"{WORD}\d{{6}}", re.IGNORECASE)
# The client without a token, the one without scopes, one of each scope, one with all, and the operator.
KINDS: dict[str, tuple[str, ...] | None] = {
    "no token": None,
    "no scope": (),
    **{scope: (scope,) for scope in SCOPES},
    "all scopes": SCOPES,
    OPERATOR: SCOPES,
}


def word(n: int) -> str:
    return f"{WORD}{n:06}"


async def furnish_all(system: Platform, progress: Progress) -> list[Furnished]:
    few = asyncio.Semaphore(FURNISHED_AT_ONCE)
    done = 0

    async def one(n: int) -> Furnished:
        nonlocal done
        async with few:
            made = await furnish(system, word(n), seconds=PATIENCE_SECONDS)
        done += 1
        if done % 25 == 0:
            progress.show("tenants", done, TENANTS)
        return made

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(n)) for n in range(TENANTS)]
    return [task.result() for task in tasks]


async def test_no_client_gets_in_without_a_right_or_sees_the_words_of_another_tenant(
    system: Platform, routes: list[Operation], clients: Clients, capfd: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(capfd)
    aviary = await furnish_all(system, progress)
    chance = random.Random(SEED)

    async def wrong(op: Operation, kind: str, caller: int, target: int) -> str | None:
        scopes = KINDS[kind]
        who = None if scopes is None else ("" if kind == OPERATOR else aviary[caller].id, scopes)
        path, body = request(op, aviary[target], own=caller == target)
        answer = await answered(clients, op, path, who, body)
        status = answer.status_code
        if problem := unexpected(op, kind, status, foreign=caller != target and "{" in op.path):
            return f"{op} as {kind}, {caller} → {target}: {problem}: {status} {answer.text[:200]}"
        strange = {found.casefold() for found in _WORDS.findall(answer.text)} - {word(caller).casefold()}
        if strange and kind != OPERATOR:
            return f"{op} as {kind}, {caller} → {target}: shows {strange}"
        return None

    def drawn() -> tuple[Operation, str, int, int]:
        while True:
            op, kind = chance.choice(routes), chance.choice(list(KINDS))
            # The operator changes things of the whole platform, which other tests look at.
            if kind != OPERATOR or op.method == "GET" or OPERATOR not in op.rights:
                caller = chance.randrange(TENANTS)
                return op, kind, caller, chance.choice((caller, chance.randrange(TENANTS)))

    for begin in range(0, CALLS, 1000):
        some = [wrong(*drawn()) for _ in range(min(1000, CALLS - begin))]
        problems = [line for line in await asyncio.gather(*some) if line]
        assert problems == [], "\n".join(problems)
        if CALLS > 1000:
            progress.show("calls", begin + len(some), CALLS)


async def answered(
    clients: Clients, op: Operation, path: str, who: tuple[str, tuple[str, ...]] | None, body: Any
) -> httpx.Response:
    """The answer. A call is repeated if it was not answered in time, or if a service behind it was not (503): on a busy
    machine that shows nothing about rights."""
    for left in reversed(range(5)):
        try:
            answer = await clients.call(op, path, who, body)
        except httpx.TimeoutException:
            if not left:
                raise
        else:
            if answer.status_code != 503 or not left:
                return answer
    raise AssertionError("unreachable")


def request(op: Operation, target: Furnished, *, own: bool) -> tuple[str, Any]:
    """Path and body. Nothing that exists is changed: own things are only read, and a new thing has a bad body."""
    if "{" not in op.path:
        return op.path, None
    if own and op.method != "GET":
        return re.sub(r"\{[^}]+\}", lambda _: str(uuid4()), op.path), BODIES.get(op.name, op.example())
    return filled(op.path, target.things), BODIES.get(op.name, op.example())


def unexpected(op: Operation, kind: str, status: int, *, foreign: bool) -> str | None:
    """The fault of the status; None if it has none."""
    held = {kind} if kind != "all scopes" else set(SCOPES)
    if op.rights and not held & set(op.rights):
        wanted = 401 if kind == "no token" else 403
        return None if status == wanted else f"must be {wanted}"
    if status >= 500:
        return "an error of the service"
    if not op.rights:
        return None
    if status in (401, 403):
        return "must be let in"
    if foreign and kind != OPERATOR and op.name not in OWN_NAMES and status != 404:
        return "must not be found"
    return None
