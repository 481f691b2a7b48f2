"""Files of tools and of answers reach the person of a channel with the answer."""

from __future__ import annotations

import base64
import json

import pytest

from infra.stores.objects import Objects
from protos.plugin.v1 import plugin_pb2
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says

PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


@pytest.fixture
def objects(world: World) -> Objects:
    world.platform.stack.need("s3")
    return Objects(**world.platform.stack.engines["s3"])


def chart(world: World, *files: plugin_pb2.File) -> None:
    """The next call of the weather tool returns these files."""
    reply = plugin_pb2.CallReply(
        outcome=plugin_pb2.CallReply.OUTCOME_SUCCEEDED, result_json=json.dumps("done"), files=files
    )
    world.peers.plugin.outcomes["weather"] = [reply]


async def test_a_tools_file_and_a_data_url_are_stored_and_sent(world: World, tenant: Tenant, objects: Objects) -> None:
    agent = await tenant.agent(tools=["weather"], system_prompt=tenant.id)
    chart(
        world,
        plugin_pb2.File(name="chart-1.png", content=PNG),
        plugin_pb2.File(name="program", content=b"\x00\x01\x02"),
    )
    picture = base64.b64encode(PNG).decode()
    answer = f"Sunny. ![map](data:image/png;base64,{picture})"
    world.models.script(MODEL, Says(calls=(("weather", '{"city": "Bern"}'),)), Says(answer))
    await tenant.receive(agent, "weather?")
    [run] = await tenant.runs(1)
    assert (run["status"], run["reply"]) == ("completed", "Sunny. [map.png]")
    [sent] = await tenant.sent("channel.outbound")
    assert sent["text"] == "Sunny. [map.png]"
    assert [file["name"] for file in sent["files"]] == ["chart-1.png", "map.png"]
    for file in sent["files"]:
        # The erasure of the person finds it there.
        assert file["path"].startswith(f"person-1/attachments/{tenant.id}/{run['id']}_")
        async with objects.fetch(file["path"]) as stored:
            assert stored.read() == PNG
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    told = str(last.body["messages"][-1]["content"])
    assert "[chart-1.png is sent to the person after your answer.]" in told
    assert "[program is not sent to the person: file: has the type application/octet-stream" in told


async def test_a_run_of_the_api_keeps_the_answer_and_stores_no_file(
    world: World, tenant: Tenant, objects: Objects
) -> None:
    agent = await tenant.agent(tools=["weather"], system_prompt=tenant.id)
    chart(world, plugin_pb2.File(name="chart-1.png", content=PNG))
    answer = "![map](data:image/png;base64,AAAA)"
    world.models.script(MODEL, Says(calls=(("weather", '{"city": "Bern"}'),)), Says(answer))
    run = await tenant.over(await tenant.say(agent, "weather?"))
    assert run["reply"] == answer
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert "not sent to the person: only a chat shows files" in str(last.body["messages"][-1]["content"])
