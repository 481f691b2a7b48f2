"""Checks the description of a plugin, and converts the tools of a tenant or an MCP server to tools for models."""

from __future__ import annotations

import base64
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from infra.errors import InvalidMessage
from infra.outgoing.webhooks import read_secret
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn
from infra.web.json_schema import StepBudget, check, check_schema
from infra.web.json_schema.drafts import adapted, check_depth
from services.plugin.domain import McpTool, Tool, plain_name
from services.plugin.models import LeftOut, NewPlugin

SEALED = SealedColumn("plugin", "access", "plugin access", ("tenant_id", "id::text"))
MAX_CONFIG_BYTES = 16 * 1024
MAX_DESCRIPTION = 4_000

NamedTool = tuple[Tool, str]
"""A tool, and its name on its server."""

# Headers of the connection, which the client sets itself.
_RESERVED_HEADERS = ("host", "content-length", "content-type", "transfer-encoding", "connection", "accept")


class Access(msgspec.Struct, frozen=True):
    """The credentials of a plugin."""

    secret: str
    """Standard Webhooks secret. Empty for an MCP server."""
    headers: dict[str, str]

    def seal(self, cipher: Cipher, tenant_id: str, plugin_id: str) -> bytes:
        return cipher.seal(msgspec.json.encode(self), "plugin access", tenant_id, plugin_id)

    @classmethod
    def open(cls, sealed: bytes, cipher: Cipher, tenant_id: str, plugin_id: str) -> Access:
        content = cipher.open(sealed, "plugin access", tenant_id, plugin_id)
        return msgspec.json.decode(content, type=cls)


def checked_plugin(new: NewPlugin) -> tuple[dict[str, Any], list[NamedTool]]:
    """The schema of the config and the tools of kind http. Raises InvalidMessage with the field.

    It checks the rules that the types do not express. Schemas may make it slow: call it in a thread.
    """
    for header in new.headers:
        if header.lower() in _RESERVED_HEADERS or header.lower().startswith("webhook-"):
            raise InvalidMessage(f"headers.{header}", "cannot be set")
    if new.kind == "mcp":
        for field in ("secret", "tools", "config", "config_schema"):
            if field in new.model_fields_set:
                raise InvalidMessage(field, "is allowed only for kind http")
        return {}, []
    if not new.tools:
        raise InvalidMessage("tools", "must have at least one tool for kind http")
    if new.secret is not None:
        read_secret(new.secret)
    budget = StepBudget()
    config_schema = _checked_schema("config_schema", new.config_schema, budget)
    check_config(new.config, config_schema)
    return config_schema, _declared_tools(new, budget)


def _checked_schema(field: str, schema: Any, budget: StepBudget) -> dict[str, Any]:
    """Returns a schema of an older draft in draft 2020-12. Raises InvalidMessage if it is invalid or too large."""
    new = adapted(field, schema)
    check_schema(field, new, budget)
    return new


def check_config(config: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raises InvalidMessage with the field."""
    check_depth("config", config)
    if len(msgspec.json.encode(config)) > MAX_CONFIG_BYTES:
        raise InvalidMessage("config", f"must be at most {MAX_CONFIG_BYTES} bytes")
    check("config", schema, config)


def new_secret() -> str:
    return f"whsec_{base64.b64encode(os.urandom(32)).decode()}"


def _declared_tools(new: NewPlugin, budget: StepBudget) -> list[NamedTool]:
    """Returns the tools of kind http. Raises InvalidMessage for an invalid schema and for a repeated name."""
    tools: dict[str, NamedTool] = {}
    for n, tool in enumerate(new.tools):
        if tool.name in tools:
            raise InvalidMessage(f"tools[{n}].name", "must be unique")
        schema = _checked_schema(f"tools[{n}].schema", tool.schema_, budget)
        tools[tool.name] = Tool(tool.name, tool.description, schema, tool.effect), tool.name
    return list(tools.values())


def checked_tools(found: Sequence[McpTool]) -> tuple[list[McpTool], list[LeftOut]]:
    """Returns the tools of an MCP server with their schemas in draft 2020-12, and the tools that cannot be offered.

    Schemas may make it slow: call it in a thread, and before the transaction.
    """
    budget = StepBudget()
    tools: list[McpTool] = []
    left_out: list[LeftOut] = []
    for offer in found:
        try:
            if not offer.name or "\x00" in offer.name:
                raise InvalidMessage("name", "must be a text without NUL that is not empty")
            tools.append(offer._replace(schema=_checked_schema("schema", offer.schema, budget)))
        except InvalidMessage as error:
            left_out.append(LeftOut(name=offer.name, reason=str(error)))
    return tools, left_out


def named_tools(
    checked: Sequence[McpTool], plugin: str, taken: Collection[str], known: Mapping[str, str]
) -> tuple[list[NamedTool], list[LeftOut]]:
    """Returns the checked tools under names that are not in `taken`, and those that get no name.

    A known tool (`known`: its name on the server → our name) keeps its name. A new tool whose name is taken gets the
    plugin's name as a prefix.
    """
    tools: list[NamedTool] = []
    left_out: list[LeftOut] = []
    names = {*taken}
    # Known tools come first, so that a new tool does not take one of their names.
    for offer in sorted(checked, key=lambda offer: offer.name not in known):
        choices = (known.get(offer.name), plain_name(offer.name), plain_name(f"{plugin}_{offer.name}"))
        name = next((choice for choice in choices if choice and choice not in names), None)
        if name is None:
            reason = "name: is taken, with and without the plugin's name as a prefix"
            left_out.append(LeftOut(name=offer.name, reason=reason))
            continue
        names.add(name)
        description = offer.description.replace("\x00", "")[:MAX_DESCRIPTION]
        tools.append((Tool(name, description, offer.schema, "repeatable" if offer.repeatable else "once"), offer.name))
    return sorted(tools, key=lambda named: named[0].name), left_out
