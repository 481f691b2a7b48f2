"""Compiles the .proto files, and finds changes in them that are incompatible within one version of their package."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class ProtoError(Exception):
    """A .proto file does not compile. The compiler has printed the reason to standard error."""


def compile_protos(root: Path) -> tuple[dict[str, str], Json]:
    """Compiles every .proto below ``root/protos``.

    Returns path relative to `root` → stub, and the descriptor set as JSON. Needs the test requirements.
    """
    from google.protobuf import json_format
    from google.protobuf.descriptor_pb2 import FileDescriptorSet
    from grpc_tools import protoc

    sources = [path.relative_to(root).as_posix() for path in sorted(root.glob("protos/**/*.proto"))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            f"--proto_path={root}",
            f"--proto_path={files('grpc_tools') / '_proto'}",
            f"--plugin=protoc-gen-mypy={Path(sys.executable).with_name('protoc-gen-mypy')}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).with_name('protoc-gen-mypy_grpc')}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            f"--mypy_out=quiet:{folder}",
            f"--mypy_grpc_out=quiet,only_async:{folder}",
            f"--descriptor_set_out={folder}/descriptors",
        ]
        if protoc.main(["protoc", *arguments, *sources]) != 0:
            raise ProtoError(f"the .proto files below {root / 'protos'} do not compile")
        stubs = {
            path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(Path(folder).rglob("*.py*"))
        }
        descriptors = FileDescriptorSet.FromString((Path(folder) / "descriptors").read_bytes())
    document = json.loads(json_format.MessageToJson(descriptors))
    return stubs, document


def breaking_protos(old: Json, new: Json) -> list[str]:
    """The changes from `old` to `new` that break callers or servers built from `old`.

    A field keeps its number, its name and its type: the wire uses the number, and code uses the name. A field may be
    removed if its number becomes reserved and stays reserved: the bytes of an old caller must never be read as another
    field. A method, a message or a value of an enum may not be removed.
    """
    now = dict(_elements(new))
    problems = []
    for name, was in _elements(old):
        if now.get(name) == was:
            continue
        if name in now:
            problems.append(f"{name}: was {was}, is {now[name]}")
        elif not _is_reserved(name, now):
            problems.append(f"{name}: removed")
    return problems


def _is_reserved(name: str, now: dict[str, str]) -> bool:
    message, _, number = name.partition(" field ")
    reserved = (key.partition(f"{message} reserved ")[2].split("-") for key in now if number)
    return any(int(bounds[0]) <= int(number) < int(bounds[1]) for bounds in reserved if len(bounds) == 2)


def _elements(document: Json) -> Iterator[tuple[str, str]]:
    """(name, description) of each element that a caller depends on."""
    for file in document.get("file", []):
        package = file["package"]
        for message in file.get("messageType", []):
            yield from _message(f"{package}.{message['name']}", message)
        for enum in file.get("enumType", []):
            yield from _enum(f"{package}.{enum['name']}", enum)
        for service in file.get("service", []):
            for method in service.get("method", []):
                streams = [key for key in ("clientStreaming", "serverStreaming") if method.get(key)]
                shape = " ".join([method["inputType"], "→", method["outputType"], *streams])
                yield f"{package}.{service['name']}/{method['name']}", shape


def _message(path: str, message: Json) -> Iterator[tuple[str, str]]:
    yield path, "message"
    for span in message.get("reservedRange", []):
        yield f"{path} reserved {span['start']}-{span['end']}", "reserved"
    for field in message.get("field", []):
        oneof = (
            " optional"
            if field.get("proto3Optional")
            else f" oneof {field['oneofIndex']}"
            if "oneofIndex" in field
            else ""
        )
        shape = f"{field['name']} {field['label']} {field.get('typeName', field['type'])}{oneof}"
        yield f"{path} field {field['number']}", shape
    for nested in message.get("nestedType", []):
        yield from _message(f"{path}.{nested['name']}", nested)
    for enum in message.get("enumType", []):
        yield from _enum(f"{path}.{enum['name']}", enum)


def _enum(path: str, enum: Json) -> Iterator[tuple[str, str]]:
    yield path, "enum"
    for value in enum["value"]:
        yield f"{path} value {value.get('number', 0)}", value["name"]
