"""The delay that another side asks for is bounded, for any text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from math import inf, nan

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.outgoing.retry_after import LONGEST, SHORTEST, delay, retry_after


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", timedelta(seconds=7)),
        (" 1.5 ", timedelta(seconds=1.5)),
        ("0", SHORTEST),
        (str(10**30), LONGEST),
        ("Sun, 06 Nov 1994 08:49:37 GMT", SHORTEST),
        ("Sunday, 06-Nov-94 08:49:37 GMT", SHORTEST),
        ("Sun Nov  6 08:49:37 1994", SHORTEST),
        ("Fri, 31 Dec 9999 23:59:59 -2359", LONGEST),
        *((text, None) for text in ("", "-1", "nan", "inf", "1e3", "1_000", "0x9", "٣", "soon", "9" * 100_000)),
        *((text, None) for text in ("Sun, 06 Nov 1994 08:49:37 +99999", "Sun, 06 Nov 99999 08:49:37 GMT")),
    ],
)
def test_the_header(text: str, expected: timedelta | None) -> None:
    assert retry_after({"retry-after": text}) == expected


def test_a_date_is_the_time_until_then() -> None:
    text = format_datetime(datetime.now(UTC) + timedelta(minutes=1), usegmt=True)
    found = retry_after({"retry-after": text})
    assert found
    assert timedelta(seconds=55) < found <= timedelta(minutes=1)


@given(st.one_of(st.text(max_size=70), st.floats().map(str), st.datetimes().map(format_datetime)))
@example("Mon, 01 Jan 0001 00:00:00 +2359")
def test_any_text_is_read_or_left(text: str) -> None:
    found = retry_after({"retry-after": text})
    assert found is None or SHORTEST <= found <= LONGEST


@pytest.mark.parametrize(("seconds", "expected"), [(nan, SHORTEST), (-inf, SHORTEST), (inf, LONGEST), (1e300, LONGEST)])
def test_seconds_of_a_body_are_bounded_too(seconds: float, expected: timedelta) -> None:
    assert delay(seconds) == expected
