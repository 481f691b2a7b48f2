"""The chain of hashes."""

from __future__ import annotations

import hashlib

import pytest

from services.log_aggregator.audit.domain import EMPTY, GENESIS, ChainHead, Link, canonical, chained, first_break

RECORDS = [canonical({"n": n}) for n in range(5)]


def chain() -> list[Link]:
    return list(chained(EMPTY, RECORDS))


def test_a_hash_covers_the_one_before_it_and_the_record() -> None:
    first, second, *_ = chain()
    assert first == Link(1, '{"n":0}', hashlib.sha256(bytes(32) + b'{"n":0}').digest())
    assert second == Link(2, '{"n":1}', hashlib.sha256(first.hash + b'{"n":1}').digest())


def test_records_added_in_two_goes_make_the_same_chain() -> None:
    first = list(chained(EMPTY, RECORDS[:2]))
    assert first + list(chained(ChainHead(2, first[-1].hash), RECORDS[2:])) == chain()


def test_canonical_json_depends_only_on_the_content() -> None:
    assert canonical({"b": "é\x00", "a": {"d": 1, "c": None}}) == '{"a":{"c":null,"d":1},"b":"\\u00e9\\u0000"}'


def test_an_intact_chain_has_no_break_from_any_start() -> None:
    links = chain()
    assert first_break(EMPTY, links) is None
    assert first_break(ChainHead(2, links[1].hash), links[2:]) is None


@pytest.mark.parametrize("n", range(5))
def test_a_changed_record_is_found(n: int) -> None:
    links = chain()
    links[n] = links[n]._replace(record='{"n":9}')
    assert first_break(EMPTY, links) == n + 1


def test_a_missing_a_doubled_and_a_swapped_record_are_found() -> None:
    a, b, c, *_ = chain()
    assert first_break(EMPTY, [a, c]) == 2
    assert first_break(EMPTY, [a, b, b]) == 3
    assert first_break(EMPTY, [b, a]) == 1


def test_a_record_changed_together_with_its_hash_breaks_the_next_link() -> None:
    links = chain()
    [links[1]] = chained(ChainHead(1, links[0].hash), ['{"n":9}'])
    assert first_break(EMPTY, links) == 3
    assert first_break(ChainHead(1, GENESIS), links[1:]) == 2
