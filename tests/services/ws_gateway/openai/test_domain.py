"""The text of a run in a stream that cannot take text back."""

from __future__ import annotations

import pytest

from services.ws_gateway.domain import Delta
from services.ws_gateway.openai.domain import Piece, TakenBack, Transcript


def told(*deltas: tuple[int, int, int, str]) -> Transcript:
    """Each of the `deltas` has step, attempt, n and text."""
    transcript = Transcript()
    transcript.began(1, "model", 1)
    for delta in deltas:
        transcript.delta(Delta(*delta))
    return transcript


def test_pieces_go_on_as_they_come_and_the_reply_adds_nothing() -> None:
    transcript = told()
    assert transcript.delta(Delta(1, 1, 1, "Good")) == Piece(1, "Good")
    assert transcript.delta(Delta(1, 1, 2, " day")) == Piece(1, " day")
    assert transcript.reply("Good day") == Piece(1, "")


def test_a_piece_that_comes_twice_is_sent_once() -> None:
    assert told((1, 1, 1, "Good")).delta(Delta(1, 1, 1, "Good")) is None


@pytest.mark.parametrize("missed", [1, 2])
def test_behind_a_piece_that_is_missing_the_rest_comes_with_the_reply(missed: int) -> None:
    pieces = ["Good", " day", "!"]
    transcript = told(*((1, 1, n, text) for n, text in enumerate(pieces, 1) if n < missed))
    assert transcript.delta(Delta(1, 1, missed + 1, pieces[missed])) is None
    assert transcript.reply("Good day!") == Piece(1, "".join(pieces[missed - 1 :]))


def test_another_attempt_takes_back_what_was_sent() -> None:
    with pytest.raises(TakenBack):
        told((1, 1, 1, "Good")).delta(Delta(1, 2, 1, "Hi"))
    with pytest.raises(TakenBack):
        told((1, 1, 1, "Good")).began(1, "model", 2)


def test_another_attempt_is_no_matter_where_nothing_was_sent() -> None:
    transcript = told((1, 1, 2, " day"))
    transcript.began(1, "model", 2)
    assert transcript.delta(Delta(1, 2, 1, "Hi")) == Piece(1, "Hi")
    # This fact arrives late, after the text.
    transcript.began(1, "model", 2)
    assert transcript.reply("Hi") == Piece(1, "")


def test_a_reply_that_differs_from_what_was_sent_takes_it_back() -> None:
    with pytest.raises(TakenBack):
        told((1, 1, 1, "Good")).reply("Bad")


def test_text_before_a_tool_call_is_of_a_step_of_its_own() -> None:
    transcript = told((1, 1, 1, "Let me see."))
    transcript.began(2, "tool", 1)
    # The first text may arrive before the start of the step.
    assert transcript.delta(Delta(3, 1, 1, "Wet")) == Piece(3, "Wet")
    assert transcript.delta(Delta(1, 1, 2, " So.")) is None
    transcript.began(3, "model", 1)
    assert transcript.reply("Wet.") == Piece(3, ".")


def test_of_a_last_step_that_was_not_heard_all_comes_with_the_reply() -> None:
    transcript = told((1, 1, 1, "Wet"))
    transcript.began(2, "tool", 1)
    transcript.began(3, "model", 1)
    transcript.delta(Delta(3, 1, 2, "."))
    assert transcript.reply("Wet.") == Piece(3, "Wet.")
