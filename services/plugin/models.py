"""Request and response bodies of plugin's HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from infra.web.json_text import NAME_PATTERN
from services.plugin.domain import TOOL_NAME, Effect

ToolName = Annotated[str, StringConstraints(pattern=f"^{TOOL_NAME.pattern}$")]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=NAME_PATTERN)]
# PostgreSQL's text cannot hold a NUL.
Text = Annotated[str, StringConstraints(max_length=4_000, pattern=r"^[^\x00]*$")]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")]
HeaderValue = Annotated[str, StringConstraints(max_length=4_000, pattern=r"^[\x20-\x7e]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", serialize_by_alias=True)


class NewTool(_Model):
    """A tool of a plugin of kind http."""

    name: ToolName
    description: Text
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON Schema of the arguments, an object."""
    effect: Effect = "once"


class ToolView(_Model):
    name: str
    description: str
    schema_: dict[str, Any] = Field(alias="schema")
    effect: Effect
    plugin: str


class ToolList(_Model):
    items: list[ToolView]
    next: str | None


class NewPlugin(_Model):
    """A tool server to register."""

    name: Name
    kind: Literal["http", "mcp"]
    url: Annotated[str, StringConstraints(min_length=1, max_length=2_000)]
    secret: str | None = None
    """Standard Webhooks secret, for kind http. If it is missing, one is made and shown once in the answer."""
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict, max_length=20)
    """Sent with each call, such as Authorization. Their values are never shown again."""
    tools: list[NewTool] = Field(default_factory=list, max_length=100)
    """For kind http. An MCP server lists its own tools."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Sent with each call, for kind http."""
    config_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})
    """JSON Schema of `config`."""


class PluginChange(_Model):
    enabled: bool | None = None
    config: dict[str, Any] | None = None


class LeftOut(_Model):
    """A tool of an MCP server that cannot be offered, with the reason."""

    name: str
    reason: str


class PluginView(_Model):
    id: str
    """The name, if the plugin is built in."""
    name: str
    kind: Literal["builtin", "http", "mcp"]
    url: str | None = None
    enabled: bool
    headers: list[str] = Field(default_factory=list)
    """The names of the headers."""
    config: dict[str, Any] = Field(default_factory=dict)
    config_schema: dict[str, Any] = Field(default_factory=dict)
    tools: list[ToolView]
    created_at: datetime | None = None
    left_out: list[LeftOut] = Field(default_factory=list)
    """Only in the answer to a registration or a refresh."""
    secret: str | None = None
    """Only in the answer to the registration that made it."""


class PluginList(_Model):
    items: list[PluginView]
    next: str | None
