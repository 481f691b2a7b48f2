"""What the HTTP surface takes and gives."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from services.plugin.domain import TOOL_NAME, Effect

ToolName = Annotated[str, StringConstraints(pattern=f"^{TOOL_NAME.pattern}$")]
# PostgreSQL's text has no NUL, and a name has no line breaks.
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=r"^[^\x00-\x1f]*$")]
Text = Annotated[str, StringConstraints(max_length=4_000, pattern=r"^[^\x00]*$")]
HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")]
HeaderValue = Annotated[str, StringConstraints(max_length=4_000, pattern=r"^[\x20-\x7e]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", serialize_by_alias=True)


class NewTool(_Model):
    """A tool as a tenant describes it; `schema`: JSON Schema of its arguments, an object."""

    name: ToolName
    description: Text
    schema_: dict[str, Any] = Field(alias="schema")
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
    """A tool server. `tools` are those of kind http; an MCP server tells its own.

    secret: of Standard Webhooks, for kind http; without one it is made and shown once in the answer.
    headers: sent with each call, such as Authorization; never shown again.
    config: sent with each call, for kind http; `config_schema`: what it must be like.
    """

    name: Name
    kind: Literal["http", "mcp"]
    url: Annotated[str, StringConstraints(min_length=1, max_length=2_000)]
    secret: str | None = None
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict, max_length=20)
    tools: list[NewTool] = Field(default_factory=list, max_length=100)
    config: dict[str, Any] = Field(default_factory=dict)
    config_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"})


class PluginChange(_Model):
    enabled: bool | None = None
    config: dict[str, Any] | None = None


class LeftOut(_Model):
    """A tool of an MCP server that cannot be offered, and why."""

    name: str
    reason: str


class PluginView(_Model):
    """id: the name where it is built in. headers: their names. left_out, secret: only in the answer to the request
    that set them."""

    id: str
    name: str
    kind: Literal["builtin", "http", "mcp"]
    url: str | None = None
    enabled: bool
    headers: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    config_schema: dict[str, Any] = Field(default_factory=dict)
    tools: list[ToolView]
    created_at: datetime | None = None
    left_out: list[LeftOut] = Field(default_factory=list)
    secret: str | None = None


class PluginList(_Model):
    items: list[PluginView]
    next: str | None
