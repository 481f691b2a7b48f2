"""From what a tenant or an MCP server says of its tools to tools that can be offered."""

from __future__ import annotations

import base64
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import mcp_types
import msgspec

from infra.errors import InvalidMessage
from infra.outgoing.webhooks import read_secret
from infra.security.crypto import Cipher
from infra.web.json_schema import check, check_schema
from services.plugin.domain import Tool, plain_name
from services.plugin.models import LeftOut, NewPlugin

MAX_CONFIG_BYTES = 16 * 1024
MAX_DESCRIPTION = 4_000

Named = tuple[Tool, str]
"""A tool, and how its server calls it."""

# What is between us and the server is ours to say.
_OURS = ("host", "content-length", "content-type", "transfer-encoding", "connection", "accept")


class Access(msgspec.Struct, frozen=True):
    """What only plugin may see of a plugin. `secret`: of Standard Webhooks; empty for an MCP server."""

    secret: str
    headers: dict[str, str]

    def seal(self, cipher: Cipher, tenant_id: str, plugin_id: str) -> bytes:
        return cipher.seal(msgspec.json.encode(self), "plugin access", tenant_id, plugin_id)

    @classmethod
    def open(cls, sealed: bytes, cipher: Cipher, tenant_id: str, plugin_id: str) -> Access:
        content = cipher.open(sealed, "plugin access", tenant_id, plugin_id)
        return msgspec.json.decode(content, type=cls)


def check_plugin(new: NewPlugin) -> None:
    """What its types do not say. Raises InvalidMessage naming the field."""
    for header in new.headers:
        if header.lower() in _OURS or header.lower().startswith("webhook-"):
            raise InvalidMessage(f"headers.{header}", "cannot be set")
    if new.kind == "mcp":
        for field in ("secret", "tools", "config", "config_schema"):
            if field in new.model_fields_set:
                raise InvalidMessage(field, "only kind http has it")
        return
    if not new.tools:
        raise InvalidMessage("tools", "kind http needs at least one")
    if new.secret is not None:
        read_secret(new.secret)
    check_schema("config_schema", new.config_schema)
    check_config(new.config, new.config_schema)


def check_config(config: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raises InvalidMessage naming the field."""
    if len(msgspec.json.encode(config)) > MAX_CONFIG_BYTES:
        raise InvalidMessage("config", f"larger than {MAX_CONFIG_BYTES} bytes")
    check("config", schema, config)


def new_secret() -> str:
    return f"whsec_{base64.b64encode(os.urandom(32)).decode()}"


def declared(new: NewPlugin) -> list[Named]:
    """The tools of kind http. Raises InvalidMessage for a schema that is none, and a name that comes twice."""
    seen: set[str] = set()
    for n, tool in enumerate(new.tools):
        if tool.name in seen:
            raise InvalidMessage(f"tools[{n}].name", "comes twice")
        seen.add(tool.name)
        check_schema(f"tools[{n}].schema", tool.schema_)
    return [(Tool(tool.name, tool.description, tool.schema_, tool.effect), tool.name) for tool in new.tools]


def adopted(
    found: Sequence[mcp_types.Tool], plugin: str, taken: Collection[str], known: Mapping[str, str]
) -> tuple[list[Named], list[LeftOut]]:
    """The tools of an MCP server under names that nobody has in `taken`, and those that cannot be offered.

    A tool that was there before (`known`: its own name → ours) keeps its name; a new one whose name is taken gets the
    plugin's in front.
    """
    tools: list[Named] = []
    left_out: list[LeftOut] = []
    names = {*taken}
    # Those that have a name already come first, so that a new one does not take it.
    for offer in sorted(found, key=lambda offer: offer.name not in known):
        choices = (known.get(offer.name), plain_name(offer.name), plain_name(f"{plugin}_{offer.name}"))
        name = next((choice for choice in choices if choice and choice not in names), None)
        try:
            if name is None or "\x00" in offer.name:
                raise InvalidMessage("name", "is taken, and so is the one with the plugin's name in front")
            check_schema("schema", offer.input_schema)
        except InvalidMessage as error:
            left_out.append(LeftOut(name=offer.name, reason=str(error)))
            continue
        names.add(name)
        hints = offer.annotations
        reads = hints is not None and bool(hints.read_only_hint or hints.idempotent_hint)
        description = (offer.description or offer.title or "").replace("\x00", "")[:MAX_DESCRIPTION]
        tools.append((Tool(name, description, offer.input_schema, "repeatable" if reads else "once"), offer.name))
    return sorted(tools, key=lambda named: named[0].name), left_out
