"""``./claw logs``: the log files of the engines and services, and the lines of all services in the search index."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.text import Text

from services.log_aggregator.index import searches
from tooling.cli.client import gateway
from tooling.cli.output import print_json, printable
from tooling.stack import operator
from tooling.stack.engines.base import EngineError
from tooling.stack.home import SERVICES, home_folder
from tooling.stack.services import parts
from tooling.stack.supervisor import Supervisor

_PAGE = 200
_LINES = 50


def logs(
    name: Annotated[str, typer.Argument(help="An engine or service. Default: all.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing new lines.")] = False,
    search: Annotated[str, typer.Option(help='Search the index: words, "phrases", -excluded words.')] = "",
    trace: Annotated[str, typer.Option(help="Search the index: lines of this trace.")] = "",
    run: Annotated[UUID | None, typer.Option(help="Search the index: lines of this run.")] = None,
    channel: Annotated[UUID | None, typer.Option(help="Search the index: lines of this channel.")] = None,
    tenant: Annotated[str, typer.Option(help="Search the index: lines of this tenant.")] = "",
    saved: Annotated[searches.Name | None, typer.Option(help="Search the index: lines that match this search.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Search the index: the first moment, local time.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Search the index: the end, exclusive, local time.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"With a search: the maximum number of lines; {_LINES} without it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With a search: print one JSON document.")] = False,
) -> None:
    """Show the last lines of an engine's or a service's log, or search the lines of all services."""
    wanted = {"q": search, "trace_id": trace, "run_id": run, "channel_id": channel, "tenant_id": tenant}
    times = {
        key: operator.local_time(f"--{key}", time).isoformat()
        for key, time in (("since", since), ("until", until))
        if time
    }
    params = {key: str(value) for key, value in (wanted | {"search": saved, "service": name} | times).items() if value}
    if params.keys() - {"service"}:
        if trace and not re.fullmatch("[0-9a-f]{32}", trace):
            raise EngineError(f"--trace: {trace!r} must be 32 digits from 0 to f, as ./claw run show prints them")
        if follow:
            raise EngineError("--follow: a search shows stored lines; leave it out")
        if name and name not in SERVICES:
            raise EngineError(f"{name!r}: the index has lines of {', '.join(SERVICES)}")
        found, more = asyncio.run(_search(params, limit or _LINES))
        if as_json:
            print_json(found)
        else:
            show(Console(highlight=False), found)
        if more:
            Console(stderr=True, highlight=False).print(
                f"Older lines match too: these are the newest {len(found)}. --limit shows more.", soft_wrap=True
            )
        return
    if as_json or limit:
        raise EngineError(f"{'--json' if as_json else '--limit'}: needs a search, such as --since or --saved errors")
    _tail(name, follow=follow)


async def _search(params: dict[str, str], limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The lines that match, the newest first, and whether there are more."""
    access = operator.access()
    found: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    async with gateway(access["base_url"], access["admin_token"]) as api:
        while True:
            page = await api.get("/api/v1/logs", **params, **cursor, limit=str(min(limit - len(found), _PAGE)))
            found += page["items"]
            if not page["next"] or len(found) >= limit:
                return found, bool(page["next"])
            cursor = {"cursor": page["next"]}


def show(console: Console, lines: list[dict[str, Any]]) -> None:
    """Prints the lines, the newest last."""
    for line in reversed(lines):
        data = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in line["data"].items())
        text = f"{line['timestamp']} {line['level']:<5} {line['service']:<14} {line['message']}  {data}"
        console.print(Text(printable(text), "red" if line["level"] in ("error", "fatal") else ""), soft_wrap=True)
    if not lines:
        console.print("No lines. The index has lines of the last 30 days, a few seconds after they were written.")


def _tail(name: str, *, follow: bool) -> None:
    supervisor = Supervisor(home_folder())
    known = [*parts(), "supervisord"]
    if name and name not in known:
        raise EngineError(f"{name!r}: must be one of {', '.join(known)}")
    files = [supervisor.log(one) for one in ([name] if name else known)]
    present = [str(file) for file in files if file.exists()]
    if not present:
        raise EngineError("there are no logs yet: start the stack with ./claw up")
    # `tail -F` follows several files at once, also when they are rotated.
    words = ["tail", "-n", "100" if name else "10", *(["-F"] if follow else []), *present]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, errors="backslashreplace") as tail:
        assert tail.stdout
        try:
            for line in tail.stdout:
                # Engines write the bytes of clients. Tabs are in traces of Java.
                print("\t".join(map(printable, line.rstrip("\n").split("\t"))), flush=True)  # noqa: T201
        finally:
            tail.terminate()
