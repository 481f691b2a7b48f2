"""Files of tools and of answers reach the person of a channel with the answer."""

from __future__ import annotations

import base64
import json

import pytest

from infra.stores.objects import Objects
from protos.plugin.v1 import plugin_pb2
from services.agent.execution.tools import RESULT_CHARACTERS
from tests.services.agent.conftest import MODEL, Tenant, World
from tooling.testing.model_server import Says

OTHER = "gpt-4o"
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
    # The next run of the session has its name and not its base64.
    await tenant.over(await tenant.say(agent, "Thanks"))
    asked = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert [message["content"] for message in asked.pop().body["messages"][1:]] == ["weather?", "[map]", "Thanks"]
    last = asked[-1]
    assert "not sent to the person: only a chat shows files" in str(last.body["messages"][-1]["content"])


async def test_an_image_of_another_agent_is_sent_and_the_model_gets_its_name(
    world: World, tenant: Tenant, objects: Objects
) -> None:
    artist = await tenant.agent(model=f"openai/{OTHER}")
    colleague = {"agent_id": artist, "name": "artist", "description": "Draws."}
    agent = await tenant.agent(agents=[colleague], system_prompt=tenant.id)
    picture = base64.b64encode(PNG).decode()
    world.models.script(MODEL, Says(calls=(("artist", '{"message":"Draw."}'),)), Says("There it is."))
    world.models.script(OTHER, Says(f"![map](data:image/png;base64,{picture}) {'x' * RESULT_CHARACTERS}"))
    await tenant.receive(agent, "A map!")
    [run] = await tenant.runs(1, agent_id=agent)
    assert run["status"] == "completed"
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    told = last.body["messages"][-1]["content"]
    assert (told[:11], told[-12:], len(told)) == ("[map.png] x", "x… (cut off)", RESULT_CHARACTERS + 11)
    [sent] = await tenant.sent("channel.outbound")
    assert (sent["text"], [file["name"] for file in sent["files"]]) == ("There it is.", ["map.png"])
    async with objects.fetch(sent["files"][0]["path"]) as stored:
        assert stored.read() == PNG


async def test_files_of_agents_that_asked_each_other_are_sent_to_the_person_who_asked_first(
    world: World, tenant: Tenant, objects: Objects
) -> None:
    painter = await tenant.agent(model="openai/gpt-4.1")
    colleague = {"agent_id": painter, "name": "painter", "description": "Paints."}
    artist = await tenant.agent(model=f"openai/{OTHER}", agents=[colleague], tools=["weather"])
    colleague = {"agent_id": artist, "name": "artist", "description": "Draws."}
    agent = await tenant.agent(agents=[colleague], system_prompt=tenant.id)
    chart(world, plugin_pb2.File(name="chart-1.png", content=PNG))
    picture = base64.b64encode(PNG).decode()
    world.models.script(MODEL, Says(calls=(("artist", '{"message":"Draw."}'),)), Says("There they are."))
    world.models.script(
        OTHER,
        Says(calls=(("painter", '{"message":"Paint."}'), ("weather", '{"city": "Bern"}'))),
        Says(f"Drawn. ![own](data:image/png;base64,{picture})"),
    )
    world.models.script("gpt-4.1", Says(f"![map](data:image/png;base64,{picture})"))
    await tenant.receive(agent, "A map!")
    [run] = await tenant.runs(1, agent_id=agent)
    assert run["status"] == "completed"
    [*_, last] = [request for request in world.models.asked(MODEL) if tenant.id in request.system]
    assert last.body["messages"][-1]["content"] == (
        "Drawn. [own.png]\n[map.png is sent to the person after your answer.]\n"
        "[chart-1.png is sent to the person after your answer.]"
    )
    [sent] = await tenant.sent("channel.outbound")
    assert (sent["text"], [file["name"] for file in sent["files"]]) == (
        "There they are.",
        ["map.png", "chart-1.png", "own.png"],
    )
    for file in sent["files"]:
        async with objects.fetch(file["path"]) as stored:
            assert stored.read() == PNG
