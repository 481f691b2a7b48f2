"""Conversion of the tools of MCP servers to tools for models."""

from __future__ import annotations

from typing import Any

from services.plugin.domain import McpTool
from services.plugin.manifest import checked_tools, named_tools


def offer(name: str, schema: Any = None, *, repeatable: bool = False) -> McpTool:
    return McpTool(name, "", schema, repeatable)


def test_a_taken_name_gets_the_plugins_name_as_a_prefix_and_a_known_name_stays() -> None:
    found = [offer("Search"), offer("search"), offer("time"), offer("Send-Mail")]
    tools, left_out = named_tools(checked_tools(found)[0], "My Office", {"time"}, {"search": "search"})
    assert {remote: tool.name for tool, remote in tools} == {
        "search": "search",
        "Search": "my_office_search",
        "time": "my_office_time",
        "Send-Mail": "send_mail",
    }
    assert left_out == []


def test_a_tool_that_cannot_be_offered_is_left_out_with_a_reason() -> None:
    found = [
        offer("fine"),
        offer("a", {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1/"}}}),
        offer("b"),
        offer(""),
        offer("c", {"type": "string"}),
        offer("d", {"type": "object", "description": "x" * 40_000}),
    ]
    checked, unusable = checked_tools(found)
    tools, left_out = named_tools(checked, "p", {"b", "p_b"}, {})
    assert [tool.name for tool, _ in tools] == ["fine"]
    assert {gone.name: gone.reason.partition(":")[0] for gone in unusable + left_out} == {
        "a": "schema.properties.x.$ref",
        "b": "name",
        "": "name",
        "c": "schema.type",
        "d": "schema",
    }


def test_only_a_tool_with_a_hint_for_it_is_repeatable() -> None:
    checked, _ = checked_tools([offer("reads", repeatable=True), offer("sends")])
    tools, _ = named_tools(checked, "p", (), {})
    assert {tool.name: tool.effect for tool, _ in tools} == {"reads": "repeatable", "sends": "once"}


def test_the_schemas_of_all_tools_together_have_a_bound_on_the_work() -> None:
    costly = {"$defs": {"a": {"allOf": [True] * 305}}, "allOf": [{"$ref": "#/$defs/a"}] * 200}
    found = [offer("cheap"), *(offer(f"t{n}", {"title": str(n), **costly}) for n in range(200))]
    tools, left_out = checked_tools(found)
    assert [tool.name for tool in tools][:2] == ["cheap", "t0"]
    assert len(tools) < 10
    assert len(tools) + len(left_out) == 201
    assert all("the schemas before it take 200000 steps together" in gone.reason for gone in left_out)
