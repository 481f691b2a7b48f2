"""Each invariant fails for the fault that it is there for, and no other one fails with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from tests.tooling.testing.campaign.made_up import ASKED, ONE, TWO, good, run, sent
from tooling.testing.campaign.evidence import Charge, DeadLetter, Evidence, Leak, ModelCall, Reply
from tooling.testing.campaign.history import history, shortest
from tooling.testing.campaign.invariants import INVARIANTS, judge


def failed(evidence: Evidence) -> list[str]:
    return [verdict.name for verdict in judge(evidence) if not verdict.held]


def test_all_invariants_hold_and_have_checked_something() -> None:
    verdicts = judge(good())
    assert [verdict.name for verdict in verdicts] == [f"I{n}" for n in range(1, 10)] == list(INVARIANTS)
    assert [verdict.violations for verdict in verdicts] == [[]] * 9
    assert all(verdict.checked for verdict in verdicts)


def lost(e: Evidence) -> None:
    e.sent.append(sent("c9 message 0 canaryred", 1.0))
    e.sent[-1].conversation = "9"


def lost_with_a_parked_copy(e: Evidence) -> None:
    lost(e)
    e.dead_letters.append(DeadLetter("x", "memory", "kafka:agent.events", "m", "boom", e.sent[-1].text))


def two_runs(e: Evidence) -> None:
    e.runs.append(replace(run("r4", ONE, 20.0), session="s4", steps=[]))


def failed_run(e: Evidence) -> None:
    e.runs[0].status = "failed"


def forged(e: Evidence) -> None:
    e.forged_accepted.append("forged")


def hidden_poison(e: Evidence) -> None:
    e.dead_letters.clear()


def no_reply(e: Evidence) -> None:
    del e.replies[1]


def two_replies(e: Evidence) -> None:
    e.replies.append(Reply("red", "1", f"You said: {TWO}", 9.5))


def apology(e: Evidence) -> None:
    e.replies.append(Reply("red", "1", "Sorry", 9.5))


def charged_twice(e: Evidence) -> None:
    e.accounts[0].debits.append(("u1", 4))


def off_by_one(e: Evidence) -> None:
    e.accounts[0].debited_nanos += 1


def never_judged(e: Evidence) -> None:
    e.accounts[0].records.append("u9")


def made_up_usage(e: Evidence) -> None:
    e.accounts[0].usage.append(Charge("u9", "plugin/x", "counted", 0, False))


def overspent(e: Evidence) -> None:
    e.accounts[1].credit_nanos = 3


def not_billed(e: Evidence) -> None:
    e.accounts[0].usage[0].estimated = True


def still_held(e: Evidence) -> None:
    e.accounts[0].held_nanos = 1


def overlap(e: Evidence) -> None:
    e.runs[0].finished = 6.5


def wrong_order(e: Evidence) -> None:
    e.runs[0].texts, e.runs[1].texts = e.runs[1].texts, e.runs[0].texts
    e.runs[0].steps, e.runs[1].steps = e.runs[1].steps, e.runs[0].steps
    e.calls[:3] = [
        ModelCall(TWO, 1, ["red"], 2.1),
        ModelCall(TWO, 2, ["red"], 2.2),
        ModelCall(ONE, 1, ["red"], 6.5),
    ]


def handled_by_two(e: Evidence) -> None:
    e.asked_twice.append(ONE)


def replies_swapped(e: Evidence) -> None:
    e.replies.reverse()


def folds_otherwise(e: Evidence) -> None:
    e.runs[0].folded = "other"


def rebuilt_otherwise(e: Evidence) -> None:
    e.rebuilt[0].equal = False


def leak(e: Evidence) -> None:
    e.leaks.append(Leak("logs", 1, ["the canary of red is in a log"]))


def mixed_request(e: Evidence) -> None:
    e.calls[0].canaries = ["red", "blue"]


def other_run(e: Evidence) -> None:
    e.sent[2].runs[1] = "r9"


def other_body(e: Evidence) -> None:
    e.sent[2].other_body = 202


def broken_chain(e: Evidence) -> None:
    e.chains[0].ok = False


def no_head(e: Evidence) -> None:
    e.chains[1].stored_heads = 0


def asked_again(e: Evidence) -> None:
    e.calls.append(ModelCall(ASKED, 1, ["blue"], 2.6))


def asked_late(e: Evidence) -> None:
    e.runs[2].steps[0].attempts = 2
    e.calls.append(ModelCall(ASKED, 1, ["blue"], 99.0))


def first_step_again(e: Evidence) -> None:
    e.runs[1].steps[0].attempts = 2
    e.calls.append(ModelCall(TWO, 1, ["red"], 7.5))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lost, ["I1", "I4"]),
        (lost_with_a_parked_copy, ["I1", "I4"]),
        (two_runs, ["I1"]),
        (failed_run, ["I1"]),
        (forged, ["I1"]),
        (hidden_poison, ["I1"]),
        (no_reply, ["I2"]),
        (two_replies, ["I2"]),
        (apology, ["I2"]),
        (charged_twice, ["I3"]),
        (off_by_one, ["I3"]),
        (never_judged, ["I3"]),
        (made_up_usage, ["I3"]),
        (overspent, ["I3"]),
        (not_billed, ["I3"]),
        (still_held, ["I3"]),
        (overlap, ["I4"]),
        (wrong_order, ["I4"]),
        (handled_by_two, ["I4"]),
        (replies_swapped, ["I4"]),
        (folds_otherwise, ["I5"]),
        (rebuilt_otherwise, ["I5"]),
        (leak, ["I6"]),
        (mixed_request, ["I6"]),
        (other_run, ["I7"]),
        (other_body, ["I7"]),
        (broken_chain, ["I8"]),
        (no_head, ["I8"]),
        (asked_again, ["I9"]),
        (asked_late, ["I9"]),
        (first_step_again, ["I9"]),
    ],
)
def test_each_fault_is_found(break_it: Callable[[Evidence], None], expected: list[str]) -> None:
    evidence = good()
    break_it(evidence)
    assert failed(evidence) == expected


def test_a_refused_run_and_an_unknown_delivery_are_promised_ends() -> None:
    evidence = good()
    no_reply(evidence)
    evidence.runs[1].deliveries = ["unknown"]
    evidence.runs[2].status = "refused"
    evidence.runs[2].steps.clear()
    evidence.calls.pop()
    evidence.accounts[1].usage.clear()
    evidence.accounts[1].debits.clear()
    evidence.accounts[1].records.clear()
    evidence.accounts[1].debited_nanos = 0
    assert failed(evidence) == []


def test_a_dead_letter_stands_for_a_message_that_has_no_run() -> None:
    evidence = good()
    evidence.sent[1].conversation = "2"
    evidence.dead_letters.append(DeadLetter("x", "agent", "lane:runs", "m", "boom", f'{{"text": "{TWO}"}}'))
    evidence.runs.pop(1)
    assert [v.what for verdict in judge(evidence) if verdict.name == "I1" for v in verdict.violations] == []


def test_an_invariant_that_has_checked_nothing_does_not_hold() -> None:
    evidence = good()
    evidence.chains.clear()
    assert failed(evidence) == ["I8"]


def test_a_failure_is_shown_by_the_message_with_the_shortest_history() -> None:
    evidence = good()
    evidence.runs[0].status = evidence.runs[1].status = "failed"
    found = shortest(evidence, judge(evidence)[0])
    assert found
    assert found[0].text == ONE
    assert found[1] == history(evidence, ONE)
    assert [line.split(" ", 1)[1].split(":")[0] for line in found[1]] == ["r1", "client", "model", "agent", "vendor"]
