"""Images of a channel's message reach the model as images."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from uuid import UUID

import pytest

from infra.clock import utcnow
from infra.stores.objects import Kind, Objects, once
from protos.catalog import CHANNEL_INBOUND
from protos.messages.channel import Image, MessageReceived
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


@pytest.fixture
async def stored(world: World, tenant: Tenant) -> str:
    """The path of a stored image."""
    world.platform.stack.need("s3")
    objects = Objects(**world.platform.stack.engines["s3"])
    path = f"person-1/attachments/s/{tenant.id}.png"
    kind = Kind("attachment", 1_000, frozenset(("image/",)))
    await objects.upload(kind, once(PNG), name="a.png", user_id="person-1", path=lambda _: path)
    return path


async def show(tenant: Tenant, agent: str, *paths: str) -> None:
    message = MessageReceived(
        channel_id=UUID(int=7),
        channel_type="telegram",
        agent_id=UUID(agent),
        session_key=f"{tenant.id}-c",
        conversation_id="c",
        subject_id="person-1",
        vendor_message_id="m1",
        text="what is this?",
        received_at=utcnow(),
        images=tuple(Image(path=path, content_type="image/png") for path in paths),
    )
    await tenant.world.platform.send(CHANNEL_INBOUND["telegram"], message, tenant_id=tenant.id)


def asked(world: World, tenant: Tenant) -> list[Any]:
    """The content of the last message of each request."""
    requests = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    return [request.body["messages"][-1]["content"] for request in requests]


async def test_an_image_is_an_image_part_and_the_history_stays(world: World, tenant: Tenant, stored: str) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await tenant.receive(agent, "hello")
    await tenant.runs(1)
    world.models.script(MODEL, Says("A cat."))
    await show(tenant, agent, stored)
    runs = await tenant.runs(2)
    assert runs[-1]["reply"] == "A cat."
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    text, image = asked(world, tenant)[-1]
    assert text == {"type": "text", "text": "what is this?"}
    assert (image["type"], image["image_url"]["url"]) == ("image_url", url)
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert last.body["messages"][1]["content"] == "hello"


async def test_an_image_that_comes_during_a_run_reaches_the_model(world: World, tenant: Tenant, stored: str) -> None:
    agent = await tenant.agent(system_prompt=tenant.id, queue_mode="steer")
    go = asyncio.Event()
    world.models.script(MODEL, Says("A cat.", waits=go), Says("Two cats."))
    await tenant.receive(agent, "hello")

    async def has_begun() -> bool:
        return bool(asked(world, tenant))

    async def joined() -> bool:
        async with world.platform.database("agent").begin() as tx:
            return await tx.sql("SELECT count(*) FROM message WHERE tenant_id = $1", tenant.id) == [(2,)]

    await world.platform.until(has_begun)
    await show(tenant, agent, stored)
    await world.platform.until(joined)
    go.set()
    [run] = await tenant.runs(1)
    assert run["reply"] == "Two cats."
    assert [part["type"] for part in asked(world, tenant)[-1]] == ["text", "image_url"]


async def test_a_model_that_takes_no_images_is_told_of_them(world: World, tenant: Tenant, stored: str) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    world.models.script(MODEL, Fails(400), Says("I cannot see it."))
    await show(tenant, agent, stored)
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "I cannot see it.")
    first, second = asked(world, tenant)
    assert isinstance(first, list)
    assert second == (
        "what is this?\n\n[An image sent with this message cannot be read by the model. Tell the person so.]"
    )


async def test_a_model_is_told_of_the_images_of_the_api_that_it_does_not_take(world: World, tenant: Tenant) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    linked = "https://example.org/a.png"
    body = {
        "text": "And these?",
        "images": [linked, f"{linked}?2"],
        "history": [{"role": "user", "text": "look", "images": [linked]}, {"role": "assistant", "text": "A dot."}],
    }
    world.models.script(MODEL, Fails(400), Says("I cannot see them."))
    path = f"/internal/agents/{agent}/completions"
    run = await tenant.over((await tenant.call("POST", path, json=body))["run_id"])
    assert (run["status"], run["reply"]) == ("completed", "I cannot see them.")
    [*_, request] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert [message["content"] for message in request.body["messages"] if message["role"] == "user"] == [
        "look\n\n[An image sent with this message cannot be read by the model. Tell the person so.]",
        "And these?\n\n[2 images sent with this message cannot be read by the model. Tell the person so.]",
    ]


async def test_an_image_that_is_gone_is_told_to_the_model(world: World, tenant: Tenant, stored: str) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await show(tenant, agent, stored, f"{stored}.gone")
    [run] = await tenant.runs(1)
    assert run["status"] == "completed"
    [(text, _)] = asked(world, tenant)
    assert text["text"].endswith("[An image sent with this message cannot be read by the model. Tell the person so.]")


async def test_images_of_the_api_are_stored_and_no_event_has_their_bytes(world: World, tenant: Tenant) -> None:
    world.platform.stack.need("s3")
    agent = await tenant.agent(system_prompt=tenant.id)
    large = base64.b64encode(PNG + bytes(3 * 1024**2)).decode()
    small = base64.b64encode(PNG).decode()
    # The content decides, and not the type that the client names.
    now, before = f"data:image/jpeg;base64,{large}", f"data:image/png;base64,{small}"
    linked = "https://example.org/a.png"
    body = {
        "text": "Describe the animal.",
        "images": [now, linked],
        "history": [{"role": "user", "text": "look", "images": [before]}, {"role": "assistant", "text": "A dot."}],
    }
    world.models.script(MODEL, Says("A cat."))
    path = f"/internal/agents/{agent}/completions"
    run = await tenant.over((await tenant.call("POST", path, json=body))["run_id"])
    assert run["reply"] == "A cat."
    [request] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    urls = [
        [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
        for message in request.body["messages"]
        if isinstance(message["content"], list)
    ]
    assert urls == [[before], [f"data:image/png;base64,{large}", linked]]
    async with world.platform.database("agent").begin() as tx:
        [(size,)] = await tx.sql("SELECT max(octet_length(data::text)) FROM event")
    assert size < 20_000
    stored = await Objects(**world.platform.stack.engines["s3"]).paths("")
    assert len([path for path in stored if f"/attachments/{tenant.id}/image_" in path]) == 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [("QUJD", "has the type text/plain"), ("QUJ", "base64"), ("iVBORw0KGgo" + "A" * 7_000_001, "more than the 5 MB")],
)
async def test_an_image_that_cannot_be_shown_is_refused_by_its_field(
    world: World, tenant: Tenant, data: str, reason: str
) -> None:
    world.platform.stack.need("s3")
    agent = await tenant.agent()
    wrong = f"data:image/png;base64,{data}"
    fine = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    for body, field in (
        ({"images": [fine, wrong]}, "images[1]"),
        ({"history": [{"role": "user", "text": "look", "images": [wrong]}]}, "history[0].images[0]"),
    ):
        path = f"/internal/agents/{agent}/completions"
        problem = await tenant.call("POST", path, expect=422, json={"text": "Hi"} | body)
        [error] = problem["errors"]
        assert error["field"] == field
        assert reason in error["message"]
