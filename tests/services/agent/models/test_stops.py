"""The end of an answer before the first of the caller's texts."""

from __future__ import annotations

import time

import pytest

from services.agent.models.stops import Stops, before


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("", (), ""),
        ("abc", (), "abc"),
        ("abc", ("x",), "abc"),
        ("abc", ("a",), ""),
        ("one STOP two STO", ("STOP",), "one "),
        ("one STO", ("STOP",), "one STO"),
        ("aab", ("ab",), "a"),
        ("abab abac", ("abac",), "abab "),
        ("x Obs y\nObservation: z", ("\nObservation:", "\nHuman:"), "x Obs y"),
        ("b then a", ("a", "b"), ""),
        ("a🦀b", ("🦀",), "a"),
    ],
)
def test_a_text_ends_before_the_first_stop_in_whatever_pieces_it_comes(
    text: str, stops: tuple[str, ...], kept: str
) -> None:
    assert before(text, stops) == kept
    for size in range(1, len(text) + 1):
        feeder = Stops(stops)
        shown = "".join(feeder.feed(text[at : at + size]) for at in range(0, len(text), size))
        # The held end of a text that has no stop comes with the reply.
        assert kept.startswith(shown)
        assert any(stop.startswith(kept.removeprefix(shown)) for stop in (*stops, ""))


def test_many_long_stops_cost_little_for_each_piece() -> None:
    """At first each piece was compared with each beginning of each stop: this took 30 s."""
    feeder = Stops([f"{'x' * 255}{n}" for n in range(16)])
    began = time.process_time()
    for _ in range(50_000):
        feeder.feed("word")
    assert time.process_time() - began < 10
