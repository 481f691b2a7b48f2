"""Images of a channel's message reach the model as images."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from infra.clock import utcnow
from infra.stores.objects import Kind, Objects
from protos.catalog import CHANNEL_INBOUND
from protos.messages.channel import Image, MessageReceived
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Fails, Says

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


@pytest.fixture
async def stored(world: World, tenant: Tenant) -> str:
    """The path of a stored image."""
    world.platform.stack.need("s3")
    objects = Objects(**world.platform.stack.engines["s3"])
    path = f"person-1/attachments/s/{tenant.id}.png"
    kind = Kind("attachment", 1_000, frozenset(("image/",)))
    await objects.upload(kind, _once(PNG), name="a.png", user_id="person-1", path=lambda _: path)
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


async def test_an_image_that_is_gone_is_told_to_the_model(world: World, tenant: Tenant, stored: str) -> None:
    agent = await tenant.agent(system_prompt=tenant.id)
    await show(tenant, agent, stored, f"{stored}.gone")
    [run] = await tenant.runs(1)
    assert run["status"] == "completed"
    [(text, _)] = asked(world, tenant)
    assert text["text"].endswith("[An image sent with this message cannot be read by the model. Tell the person so.]")
