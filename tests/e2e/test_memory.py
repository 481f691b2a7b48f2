"""A page of a long document answers a question in another language; a person's memories are used and corrected."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pytest

from tests.e2e.test_main_job import Company, sent
from tests.services.memory import files
from tooling.testing.model_server import Asked, ModelServer, Says
from tooling.testing.stack import run_claw
from tooling.testing.system import System
from tooling.testing.until import until
from tooling.testing.vendors import SlackStandIn, TelegramStandIn

MODEL = "gpt-4o-mini"
PAGES, PAGE = 300, 212
_PASSAGE = re.compile(r'<passage number="\d+" source="([^"]*)">\n(.*?)\n</passage>', re.DOTALL)
# The parts of the machine and their care; each page has a number of days of its own.
THINGS = ("pump", "fan", "belt", "filter", "bearing", "hose", "lamp", "motor", "seal", "sensor", "tank", "wheel")
ACTS = ("cleaned", "oiled", "replaced", "painted", "measured")


def manual() -> bytes:
    """Each page is about one part of a machine. One page is about something else."""
    pages = [
        f"Part {n}: the {THINGS[n % len(THINGS)]} of section {n // len(THINGS) + 1} is {ACTS[n % len(ACTS)]} "
        f"every {n + 20} days by the technician on duty."
        for n in range(1, PAGES + 1)
    ]
    pages[PAGE - 1] = "In an earthquake all workers leave the hall by the north stairs and meet at the old lighthouse."
    return files.pdf(pages)


def quotes(asked: Asked) -> Says:
    """A model that trusts the search: it quotes the first passage and names its source, as it was told to."""
    [source, text], *_ = _PASSAGE.findall(asked.system)
    return Says(f"{text} [{source}]")


@pytest.mark.timeout(900)
async def test_a_question_in_chinese_is_answered_with_the_page_of_a_long_english_document(
    system: System, models: ModelServer
) -> None:
    models.rules[MODEL] = quotes
    async with system.company("Norrland", credit_nanos=10_000_000_000) as tenant:
        api, company = tenant.api, Company(tenant.api)
        agent = await company.agent(models, knowledge=True)
        uploaded = await api.post("/api/v1/documents", files={"file": ("manual.pdf", manual(), "application/pdf")})
        assert uploaded.status_code == 202, uploaded.text
        document = uploaded.json()["id"]
        watched: list[tuple[float, str]] = []

        async def indexed() -> dict[str, Any] | None:
            shown: dict[str, Any] = (await api.get(f"/api/v1/documents/{document}")).json()
            watched.append((shown["progress"], shown["status"]))
            assert shown["status"] != "failed", shown["error"]
            return shown if shown["status"] == "indexed" else None

        shown = await until(indexed, seconds=600)
        assert (shown["progress"], shown["pages"], shown["pages_without_text"]) == (1, PAGES, [])
        assert watched == sorted(watched, key=lambda seen: seen[0])
        # It is seen on its way, and not only before and after.
        assert len({progress for progress, _ in watched if 0 < progress < 1}) > 5
        rebuilt = json.loads(run_claw(system.home, "memory", "rebuild", "--tenant", tenant.id, "--json"))
        assert rebuilt == {"texts": 1}
        [model] = json.loads(run_claw(system.home, "memory", "status", "--json"))
        assert (model["state"], model["error"]) == ("active", None)

        async with TelegramStandIn() as vendor:
            path = await company.channel("telegram", agent, vendor)
            assert await sent(system, path, vendor.update("地震的时候工人应该去哪里集合？")) == 200
            await until(partial(_answers, vendor, 1))
            [answer] = vendor.texts()
        assert "old lighthouse" in answer
        assert "manual.pdf" in answer
        assert f"page {PAGE}" in answer
        [run] = await company.ended(agent)
        timeline = (await company.get(f"/api/v1/runs/{run['id']}/timeline"))["items"]
        [found] = [item["data"]["passages"] for item in timeline if item["kind"] == "retrieve"]
        assert (found[0]["source"]["document_id"], found[0]["source"]["page"]) == (document, PAGE)


def remembers(asked: Asked) -> Says:
    """A model that answers from the memories in its prompt. It calls the tools of memories if it is told to correct a
    memory, or is asked for its source."""
    text = asked.last_user_text
    memories = [(source, said) for source, said in _PASSAGE.findall(asked.system) if source.startswith("memory")]
    after = asked.body["messages"][_last_user(asked) + 1 :]
    results = [json.loads(message["content"]) for message in after if message["role"] == "tool"]
    if "order" in text:
        return Says(" ".join(f"{said} [{source}]" for source, said in memories) or "I know nothing about you.")
    if "Correct" in text or "Where" in text:
        if not results:
            return Says(calls=(("memories_list", "{}"),))
        [memory] = results[0]["memories"]
        if "Where" in text:
            return Says(json.dumps(memory["source"]))
        if len(results) == 1:
            changed = {"memory_id": memory["memory_id"], "text": "I am allergic to walnuts."}
            return Says(calls=(("memories_correct", json.dumps(changed)),))
    return Says("Good.")


def _last_user(asked: Asked) -> int:
    return max(n for n, message in enumerate(asked.body["messages"]) if message["role"] == "user")


@pytest.mark.timeout(600)
async def test_a_person_is_remembered_in_another_channel_corrects_it_and_sees_where_it_came_from(
    system: System, models: ModelServer
) -> None:
    models.rules[MODEL] = remembers
    async with system.client(await system.tenant("Kitchen", credit_nanos=10_000_000_000)) as api:
        company = Company(api)
        agent = await company.agent(models, knowledge=True, tools=["memories_list", "memories_correct"])
        async with SlackStandIn() as slack:
            path = await company.channel("slack", agent, slack)
            [made] = (await company.get("/api/v1/channels"))["items"]

            async def says(text: str, channel: str, user: str = "U1") -> str:
                known = len(slack.ledger)
                assert await sent(system, path, slack.event(text, channel=channel, user=user)) == 200
                await until(partial(_answers, slack, known + 1))
                assert slack.ledger[-1].to == channel
                return slack.ledger[-1].text

            await says("I am allergic to nuts.", "D1")

            async def learned() -> dict[str, Any] | None:
                found = (await company.get("/api/v1/memories"))["items"]
                return found[0] if found else None

            first = await until(learned)
            assert "I am allergic to nuts." in await says("What should I order?", "D2")
            # Another person is not told.
            assert await says("What should I order?", "D3", user="U2") == "I know nothing about you."
            assert await says("Correct that, please: only walnuts.", "D2") == "Good."
            answer = await says("What should I order?", "D4")
            assert "I am allergic to walnuts." in answer
            assert "to nuts" not in answer
            source = json.loads(await says("Where do you know that from?", "D4"))
        [told, *_] = sorted(await company.runs(agent), key=lambda run: run["created_at"])
        assert (source["run_id"], source["channel_id"], source["by"]) == (told["id"], made["id"], "person")
        [memory] = (await company.get("/api/v1/memories"))["items"]
        assert (memory["id"], memory["text"]) == (first["id"], "I am allergic to walnuts.")
        assert memory["source"]["run_id"] == told["id"]


async def _answers(vendor: SlackStandIn | TelegramStandIn, count: int) -> bool:
    return len(vendor.ledger) >= count
