"""The measuring protocol of the benches."""

from __future__ import annotations

import random

import pytest

from tooling.bench.protocol import (
    Anchor,
    Slice,
    check,
    interval,
    latency,
    median_units,
    percentile,
    run_pairs,
    units,
    verdict,
)


def test_the_ratio_is_the_median_of_the_pairs_and_not_of_the_rates() -> None:
    # The machine becomes slower and slower, but in each pair ours is half as fast.
    anchor = [1000.0, 900, 800, 700, 600, 500, 400]
    result = verdict("b", "a", 0.5, anchor, [rate / 2 for rate in anchor])
    assert (result.ratio, result.low, result.high) == (0.5, 0.5, 0.5)
    assert result.met
    assert not result.void
    assert (result.anchor_rate, result.our_rate, result.pairs) == (700, 350, 7)


def test_a_goal_below_which_the_median_lies_is_missed() -> None:
    assert not verdict("b", "a", 0.51, [100.0] * 11, [50.0] * 11).met


def test_an_anchor_that_drifts_more_than_threefold_makes_the_run_void() -> None:
    steady = [100.0] * 10
    assert not verdict("b", "a", 0.5, [*steady, 300.0], [100.0] * 11).void
    void = verdict("b", "a", 0.5, [*steady, 301.0], [100.0] * 11)
    assert void.void
    assert not void.met


def test_an_outlier_does_not_move_the_interval_of_the_median() -> None:
    low, high = interval([0.7, 0.71, 0.69, 0.7, 0.72, 0.68, 0.7, 0.7, 0.71, 0.69, 9.0])
    assert 0.68 <= low <= high <= 0.72


def test_the_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    generator = random.Random(7)
    inside = 0
    for _ in range(20):
        low, high = interval([generator.gauss(1, 0.1) for _ in range(11)])
        inside += low <= 1 <= high
    assert inside >= 17


def test_the_same_ratios_have_the_same_interval() -> None:
    ratios = [0.5, 0.9, 0.7, 0.8, 0.6]
    assert interval(ratios) == interval(ratios)


def test_latencies_are_judged_by_their_p99() -> None:
    waits = [0.001] * 98 + [0.2, 0.3]
    result = latency("b", "m", 100, 50, waits)
    assert (result.p50_ms, result.p99_ms, result.count, result.met) == (1, 200, 100, False)
    assert latency("b", "m", 200, 50, waits).met


def test_of_a_unit_the_goal_is_the_most() -> None:
    assert units("b", "m", 50, 50, "commits").met
    missed = units("b", "m", 50, 50.1, "commits", commit=2.0)
    assert (missed.met, missed.made_of) == (False, {"commit": 2.0})


@pytest.mark.parametrize(("part", "expected"), [(0.01, 1), (0.5, 50), (0.501, 51), (0.99, 99), (1, 100)])
def test_a_percentile_is_the_nearest_rank(part: float, expected: int) -> None:
    assert percentile(range(1, 101), part) == expected


def test_counts_that_differ_are_refused() -> None:
    check("consume", {"rows": 5, "acknowledged": 5})
    with pytest.raises(ValueError, match="rows 4, acknowledged 5"):
        check("consume", {"rows": 4, "acknowledged": 5})


async def test_slices_are_paired_and_the_first_round_is_not_counted() -> None:
    asked: list[str] = []
    shown: list[tuple[int, int]] = []

    async def ours() -> Slice:
        asked.append("ours")
        return Slice(1 if asked.count("ours") == 1 else 80, 2)

    async def theirs() -> Slice:
        asked.append("theirs")
        return Slice(100, 2)

    [result] = await run_pairs("b", ours, [Anchor("theirs", 0.7, theirs)], lambda *at: shown.append(at), pairs=20)
    assert result.ratio == result.low == 0.8
    assert result.pairs == 20
    assert all(set(asked[n : n + 2]) == {"ours", "theirs"} for n in range(0, 42, 2))
    # Random order: each goes first at least once. By chance that fails once in a million runs.
    assert {asked[n] for n in range(0, 42, 2)} == {"ours", "theirs"}
    assert shown[-1] == (42, 42)


def test_the_median_of_several_slices_has_its_interval() -> None:
    found = median_units("b", "m", 50, [48.0, 49, 50, 51, 90], "ms", slices=5)
    assert (found.value, found.met, found.made_of) == (50, True, {"slices": 5})
    assert found.low is not None
    assert found.high is not None
    assert 48 <= found.low <= 50 <= found.high <= 90
