"""The JSON Schemas of the messages, and the changes in them that are incompatible within one version.

Within a version, old and new code must read each other's records: new readers read retained records, and during a
roll-out old readers read the records of new writers. Therefore:

- A removed field breaks old readers: they require it, or silently use its default.
- A new required field breaks new readers on retained records. A new field with a default is compatible, because a
  reader ignores unknown fields.
- A narrower type, such as an enum without one of its values, breaks new readers on retained records.
- A wider type, such as an enum with one more value, breaks old readers on new records.
- A different default changes the meaning of retained records.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import pkgutil
from typing import Any

import msgspec

import protos.messages
from protos.envelope import Message

Json = dict[str, Any]


def messages() -> dict[str, type[Message]]:
    """All messages by wire name, including those of old versions."""
    found: dict[str, type[Message]] = {}
    for module in pkgutil.walk_packages(protos.messages.__path__, "protos.messages."):
        for _, member in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(member, Message) and member.__module__ == module.name:
                found[member.wire_name()] = member
    return dict(sorted(found.items()))


def schema(message: type[Message]) -> Json:
    """The message's JSON Schema (2020-12), with the docstrings of structs and fields as descriptions."""
    document = msgspec.json.schema(message)
    module = ast.parse(inspect.getsource(inspect.getmodule(message) or protos.messages))
    structs = {node.name: node.body for node in module.body if isinstance(node, ast.ClassDef)}
    for name, definition in document["$defs"].items():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
        for field, text in itertools.pairwise(structs.get(name, ())):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=id_)), ast.Expr(value=ast.Constant(value=str(words))):
                    wire = next(f.encode_name for f in msgspec.structs.fields(_struct(message, name)) if f.name == id_)
                    definition["properties"][wire]["description"] = inspect.cleandoc(words)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


def _struct(message: type[Message], name: str) -> type[msgspec.Struct]:
    found: type[msgspec.Struct] = getattr(inspect.getmodule(message), name)
    return found


def inlined(document: Json) -> Json:
    """The schema of the message, with every reference replaced by its target."""

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(document["$defs"][node["$ref"].removeprefix("#/$defs/")])
        return {key: inline(value) for key, value in node.items()}

    result: Json = inline({"$ref": document["$ref"]})
    return result


def breaking(old: Json, new: Json) -> list[str]:
    """The incompatible changes from `old` to `new`, each with the path of its field."""
    return _compare("", inlined(old), inlined(new))


def _compare(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [problem for a, b in zip(old, new, strict=True) for problem in _compare(path, a, b)]
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{path}: was {_short(old)}, is {_short(new)}"]
    problems = _compare_fields(path, old, new) if "properties" in old and "properties" in new else []
    for key in sorted((old.keys() | new.keys()) - {"title", "description", "properties", "required"}):
        if key == "enum" or key not in old or key not in new:
            if old.get(key) != new.get(key):
                problems.append(f"{path}: {key} was {_short(old.get(key))}, is {_short(new.get(key))}")
        else:
            problems += _compare(path, old[key], new[key])
    return problems


def _compare_fields(path: str, old: Json, new: Json) -> list[str]:
    was, now = old["properties"], new["properties"]
    was_required, now_required = set(old.get("required", ())), set(new.get("required", ()))
    problems = [f"{path}.{name}: removed" for name in was if name not in now]
    problems += [f"{path}.{name}: new and required" for name in now if name not in was and name in now_required]
    for name in was.keys() & now.keys():
        if name in was_required and name not in now_required:
            problems.append(f"{path}.{name}: was required, older readers still require it")
        elif name in now_required and name not in was_required:
            problems.append(f"{path}.{name}: is required, retained records may lack it")
        else:
            problems += _compare(f"{path}.{name}", was[name], now[name])
    return sorted(problems)


def _short(value: Any) -> str:
    return msgspec.json.encode(value).decode()[:200]


def reads_back(message: type[Message], example: bytes) -> str | None:
    """None if `message` decodes `example` and writes all of its fields again, otherwise the problem.

    The message may write more fields: those that were added after the example was written.
    """
    try:
        written = msgspec.json.decode(msgspec.json.encode(msgspec.json.decode(example, type=message)))
    except msgspec.MsgspecError as error:
        return str(error)
    lost = _lost("", msgspec.json.decode(example), written)
    return f"{lost} is lost or changed when the message is decoded and encoded again" if lost else None


def _lost(path: str, example: Any, written: Any) -> str | None:
    if isinstance(example, dict) and isinstance(written, dict):
        missing = (f"{path}.{key}" for key in example if key not in written)
        deeper = (_lost(f"{path}.{key}", example[key], written[key]) for key in example if key in written)
        return next((found for found in (*missing, *deeper) if found), None)
    return None if example == written else path
