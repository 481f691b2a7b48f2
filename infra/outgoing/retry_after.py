"""The delay that another side asks for before the next try: bounded for each answer.

A header is text of a stranger: years, negative numbers, NaN, digits of other scripts, dates of three forms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime

from infra.clock import utcnow

# With none, a server that always says "again at once" would keep a worker and the database busy.
SHORTEST, LONGEST = timedelta(seconds=0.5), timedelta(days=1)
_MAX_TEXT = 64
# float() also reads "1_000", "inf" and digits of other scripts.
_SECONDS = re.compile(r"[0-9]+(\.[0-9]+)?", re.ASCII)


def delay(seconds: float) -> timedelta:
    """From half a second to a day. NaN is the shortest."""
    return timedelta(seconds=min(max(SHORTEST.total_seconds(), seconds), LONGEST.total_seconds()))


def retry_after(headers: Mapping[str, str]) -> timedelta | None:
    """The delay of ``Retry-After``: seconds, or a date of RFC 9110 §5.6.7. None without one that can be read.

    headers: with names in lower case.
    """
    text = headers.get("retry-after", "").strip()
    if len(text) > _MAX_TEXT:
        return None
    if _SECONDS.fullmatch(text):
        return delay(float(text))
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    return delay(((at if at.tzinfo else at.replace(tzinfo=UTC)) - utcnow()).total_seconds())
