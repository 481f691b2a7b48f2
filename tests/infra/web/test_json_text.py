"""Tests of the check of JSON bodies: refusals, and work that is linear in the body."""

from __future__ import annotations

import json
import threading
import tracemalloc

import pytest

from infra.errors import InvalidMessage
from infra.web import json_text
from infra.web.json_text import LARGE_BYTES, MAX_DEPTH, check_beside, check_json


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"a": [{"b": "\\u0000"}]}', "a[0].b"),
        (b'{"a": {"\\ud800": 1}}', "a"),
        (b'"\\udc00"', "body"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "body"),
        (b'{"a": [NaN]}', "a[0]"),
        (b'{"a": -Infinity}', "a"),
        (b'{"a": 1e400}', "a"),
        (b'{"a": 1E+0400}', "a"),
        (b"9" * 400 + b".0", "body"),
        (b"9" * 300 + b"e99", "body"),
    ],
)
def test_text_and_depth_that_no_store_takes_are_refused_by_their_path(body: bytes, field: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        check_json(body)
    assert refused.value.field == field


@pytest.mark.parametrize("body", [b"1e308", b'{"a": "NaN", "b": "1e999"}', b"9" * 400, b"1e-999", b"NaN NaN"])
def test_other_numbers_and_texts_pass(body: bytes) -> None:
    check_json(body)


def test_no_path_is_named_unless_its_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may be half a megabyte long: named for each of the many texts below it, a body would take minutes."""

    def named(path: object) -> str:
        raise AssertionError("a path was named")

    monkeypatch.setattr(json_text, "_name", named)
    check_json(json.dumps({"k" * 1_000: ["\U0001f600"] * 1_000}).encode())


def test_the_check_of_many_deep_values_takes_little_memory() -> None:
    body = b"[" * 98 + b"0," * 200_000 + b'"Infinity"' + b"]" * 98
    tracemalloc.start()
    try:
        check_json(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(body)


async def test_a_large_body_is_checked_in_a_thread() -> None:
    seen = []
    for size in (LARGE_BYTES, LARGE_BYTES + 1):
        await check_beside(b"0" * size, lambda _: seen.append(threading.current_thread() is threading.main_thread()))
    assert seen == [True, False]
    with pytest.raises(InvalidMessage):
        await check_beside(b'["\\u0000"]' + b" " * LARGE_BYTES)
