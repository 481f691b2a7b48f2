"""`claw contracts`: checks that the generated contracts are complete, current and compatible with the committed ones.

Generated and committed: the JSON Schema of each message and version, the AsyncAPI document, the WebSocket's messages,
the gRPC stubs and their descriptors. Written by hand and then never changed: one golden example of each message and
version.

A change is compatible if readers of the base can live with it. The base is the merge base with the main branch, or
HEAD if no main branch exists, or the files themselves if git has no commit. If the change is already merged, the base
is equal to it and shows no difference. Therefore the tree keeps the history too: the committed schema must equal the
generated one, `--write` refuses to overwrite a schema by an incompatible one, and the schema, example and struct of an
old version stay when a message gets a new version.
"""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

import msgspec
import typer

from protos.catalog import CATALOG
from services.ws_gateway import protocol
from tooling.cli.asyncapi import asyncapi
from tooling.cli.asyncapi_page import page
from tooling.cli.grpc_stubs import ProtoError, breaking_protos, compile_protos
from tooling.cli.message_schemas import breaking, messages, reads_back, schema
from tooling.cli.output import Json, print_json

ROOT = Path(__file__).parents[2]

_SCHEMAS = "protos/schemas"
_GOLDEN = f"{_SCHEMAS}/golden"
_GRPC = f"{_SCHEMAS}/grpc.json"


def contracts(write: bool = False, as_json: Json = False) -> None:
    """Check the contracts. With --write, first write all generated files if the change is compatible."""
    try:
        generated = generate(ROOT)
    except ProtoError as error:
        typer.echo(f"claw: {error}", err=True)
        raise typer.Exit(1) from error
    problems = broken(committed(ROOT), generated)
    if write and not problems:
        for path in _stale(ROOT, generated):
            (ROOT / path).unlink()
        for path, text in generated.items():
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / path).write_text(text, encoding="utf-8")
    problems += outdated(ROOT, generated) + bad_examples(ROOT)
    for problem in problems:
        typer.echo(problem, err=True)
    if as_json:
        print_json({"messages": len(messages()), "files": len(generated), "problems": problems})
    elif not problems:
        typer.echo(f"{len(messages())} messages and {len(generated)} generated files are current and compatible")
    if problems:
        raise typer.Exit(1)


def generate(root: Path) -> dict[str, str]:
    """All generated files: path relative to `root` → text."""
    stubs, descriptors = compile_protos(root)
    schemas = {f"{_SCHEMAS}/{name}.json": _text(schema(message)) for name, message in messages().items()}
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    document = asyncapi(CATALOG, project["version"])
    pages = {
        "protos/asyncapi.json": _text(document),
        "protos/asyncapi.html": page(document),
        "protos/ws-schema.json": protocol.schema(),
    }
    return {**schemas, **pages, _GRPC: _text(descriptors), **stubs}


def broken(base: dict[str, str], generated: dict[str, str]) -> list[str]:
    """The incompatible changes from `base` to `generated`; both are path → text."""
    problems = []
    for path, text in base.items():
        name = path.removeprefix(f"{_SCHEMAS}/").removesuffix(".json")
        if path.startswith(_GOLDEN):
            continue
        if path == _GRPC:
            found = breaking_protos(msgspec.json.decode(text), msgspec.json.decode(generated[_GRPC]))
            problems += [f"gRPC {problem}: make the change in a new version of the package" for problem in found]
        elif path not in generated:
            problems.append(f"{name}: the message was removed: keep its struct, because retained records need it")
        else:
            found = breaking(msgspec.json.decode(text), msgspec.json.decode(generated[path]))
            problems += [f"{name}{problem}: raise VERSION and keep the old struct" for problem in found]
    return problems


def outdated(root: Path, generated: dict[str, str]) -> list[str]:
    """Committed files that are missing, differ from the generated text, or are no longer generated."""
    differing = [path for path, text in generated.items() if _read(root / path) != text]
    return [
        f"{path}: differs from the generated file: run ./claw contracts --write"
        for path in (*differing, *_stale(root, generated))
    ]


def bad_examples(root: Path) -> list[str]:
    """Golden examples that are missing, were changed, or lose something when their struct reads and writes them."""
    base = committed(root)
    problems = []
    for name, message in messages().items():
        path = f"{_GOLDEN}/{name}.json"
        text = _read(root / path)
        if text is None:
            problems.append(f"{path}: missing: write one example of the message by hand")
        elif base.get(path, text) != text:
            problems.append(f"{path}: changed: restore it, because records of this form exist")
        elif wrong := reads_back(message, text.encode()):
            problems.append(f"{path}: {wrong}")
    return problems


def committed(root: Path) -> dict[str, str]:
    """The schemas and examples of the base (see the module's docstring): path → text."""
    for main in ("origin/main", "main", "HEAD"):
        if base := _git(root, "merge-base", "HEAD", main):
            commit = base.strip()
            paths = (_git(root, "ls-tree", "-r", "--name-only", commit, _SCHEMAS) or "").splitlines()
            return {path: _git(root, "show", f"{commit}:{path}") or "" for path in paths}
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / _SCHEMAS).rglob("*.json"))
    }


def _stale(root: Path, generated: dict[str, str]) -> list[str]:
    present = [*root.glob("protos/*/v*/*_pb2*.py*"), *root.glob(f"{_SCHEMAS}/*.json")]
    return sorted({path.relative_to(root).as_posix() for path in present} - generated.keys())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, encoding="utf-8", check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return result.stdout


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _text(document: object) -> str:
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"
