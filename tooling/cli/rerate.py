"""``./claw rerate``: rates usage again after a price was corrected."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tooling.cli.client import gateway
from tooling.cli.output import Json, print_json, printable
from tooling.stack import operator

FORMATS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]


def rerate(
    since: Annotated[datetime, typer.Option("--from", formats=FORMATS, help="The first moment, UTC.")],
    until: Annotated[datetime, typer.Option("--to", formats=FORMATS, help="The moment after the last one, UTC.")],
    tenant: Annotated[str, typer.Option(help="Only this tenant's usage.")] = "",
    book: Annotated[bool, typer.Option("--book", help="Book the differences.")] = False,
    as_json: Json = False,
) -> None:
    """Rate the usage of a period again with the current prices. Show the differences; with --book, also book them."""
    found = operator.run(_call(since, until, tenant, book=book))
    if as_json:
        print_json(found)
    else:
        draw(Console(highlight=False), found)


def draw(out: Console, found: dict[str, Any]) -> None:
    """Prints the differences; 80 columns."""
    for item in found["items"] + found["left_out"]:
        out.print(Text(printable(f"{item['tenant_id']}  {item['records']} records")))
        out.print(Text(printable(f"  {item['from_version']} → {item['to_version']}")))
        why = f", not booked: {item['reason']}" if "reason" in item else ""
        number = f" ({item['invoice_number']})" if item.get("invoice_number") else ""
        out.print(Text(printable(f"  {item['difference_nanos']} nano-units{why}{number}")))
    done = "found; --book books them" if found["dry_run"] else "booked"
    out.print(f"{found['records']} records, {found['changed']} differences {done}")


async def _call(since: datetime, until: datetime, tenant: str, *, book: bool) -> dict[str, Any]:
    access = operator.access()
    async with gateway(access["base_url"], access["admin_token"]) as api:
        body = {
            "from": since.replace(tzinfo=UTC).isoformat(),
            "to": until.replace(tzinfo=UTC).isoformat(),
            "tenant_id": tenant or None,
            "dry_run": not book,
        }
        found: dict[str, Any] = await api.post("/api/v1/billing/rerate", body)
    return found
