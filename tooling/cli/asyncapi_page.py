"""The AsyncAPI document as one static HTML page, without scripts and without resources from other places."""

from __future__ import annotations

from html import escape
from typing import Any

Json = dict[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2128 }
h2 { margin-top: 2.5rem; border-top: 1px solid #d0d7de; padding-top: 1rem }
code, h2, h3 { font-family: ui-monospace, monospace }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .8rem .2rem 0 }
td { vertical-align: top; border-top: 1px solid #eaeef2 } nav a { margin-right: 1rem; white-space: nowrap }
.who { color: #57606a }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3 } a { color: #58a6ff } }
"""


def page(document: Json) -> str:
    """The HTML page of an AsyncAPI 3.0 document that `asyncapi` has made."""
    info = document["info"]
    channels = document["channels"]
    links = " ".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in channels)
    sections = "\n".join(_channel(name, channel, document) for name, channel in channels.items())
    title = f"{escape(info['title'])} {escape(info['version'])}: topics and queues"
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body>\n<h1>{title}</h1>\n<p>{escape(info['description'])}</p>\n<nav>{links}</nav>\n{sections}\n</body>\n</html>\n"
    )


def _channel(name: str, channel: Json, document: Json) -> str:
    who: dict[str, list[str]] = {"send": [], "receive": []}
    for key, operation in document["operations"].items():
        if operation["channel"]["$ref"] == f"#/channels/{name}":
            who[operation["action"]].append(key.partition(".")[0])
    messages = "\n".join(_message(document["components"]["messages"][message]) for message in channel["messages"])
    sent, received = (escape(", ".join(services)) for services in who.values())
    return (
        f'<h2 id="{escape(name)}">{escape(name)}</h2>\n<p>{escape(channel["description"])}</p>\n'
        f'<p class="who">sent by {sent}; received by {received}</p>\n'
        f"{messages}"
    )


def _message(message: Json) -> str:
    schema = message["payload"]["schema"]
    required = schema.get("required", [])
    rows = "\n".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{escape(_type(of))}</td>"
        f"<td>{'required' if field in required else ''}</td><td>{escape(of.get('description', ''))}</td></tr>"
        for field, of in schema["properties"].items()
    )
    description = escape(schema["description"]).replace("\n", "<br>")
    return f"<h3>{escape(message['name'])}</h3>\n<p>{description}</p>\n<table>\n{rows}\n</table>"


def _type(schema: Json) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return " ".join(str(schema[key]) for key in ("type", "format") if key in schema) or "any"
