"""The type of a time in a request."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime


def _in_utc(time: datetime) -> datetime:
    # PostgreSQL's driver and comparisons convert it. Refused here, the error names the field.
    try:
        time.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be from year 1 to year 9999 in UTC") from None
    return time


Time = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A time with its zone, that is also a time in UTC. As it was given."""
