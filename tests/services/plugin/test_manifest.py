"""How tools of MCP servers become ours."""

from __future__ import annotations

from typing import Any

import mcp_types

from services.plugin.manifest import adopted


def offer(name: str, schema: dict[str, Any] | None = None, **more: Any) -> mcp_types.Tool:
    return mcp_types.Tool(name=name, input_schema=schema or {"type": "object"}, **more)


def test_names_that_are_taken_get_the_plugins_in_front_and_known_ones_stay() -> None:
    found = [offer("Search"), offer("search"), offer("time"), offer("Send-Mail")]
    tools, left_out = adopted(found, "My Office", {"time"}, {"search": "search"})
    assert {remote: tool.name for tool, remote in tools} == {
        "search": "search",
        "Search": "my_office_search",
        "time": "my_office_time",
        "Send-Mail": "send_mail",
    }
    assert left_out == []


def test_what_cannot_be_offered_is_left_out_and_told() -> None:
    found = [
        offer("fine"),
        offer("a", {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1/"}}}),
        offer("b"),
    ]
    tools, left_out = adopted(found, "p", {"b", "p_b"}, {})
    assert [tool.name for tool, _ in tools] == ["fine"]
    assert {gone.name: gone.reason.partition(":")[0] for gone in left_out} == {
        "a": "schema.properties.x.$ref",
        "b": "name",
    }


def test_only_what_says_that_it_may_be_repeated_is() -> None:
    hints = mcp_types.ToolAnnotations
    found = [
        offer("reads", annotations=hints(read_only_hint=True)),
        offer("sets", annotations=hints(idempotent_hint=True)),
        offer("sends", annotations=hints(destructive_hint=False)),
        offer("silent"),
    ]
    tools, _ = adopted(found, "p", (), {})
    assert {tool.name: tool.effect for tool, _ in tools} == {
        "reads": "repeatable",
        "sets": "repeatable",
        "sends": "once",
        "silent": "once",
    }
