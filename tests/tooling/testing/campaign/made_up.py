"""The evidence of a small campaign in which everything held."""

from __future__ import annotations

from msgspec.structs import replace

from tooling.testing.campaign.evidence import (
    Account,
    Chain,
    Charge,
    DeadLetter,
    Evidence,
    Leak,
    ModelCall,
    Poison,
    Rebuilt,
    Reply,
    Run,
    Sent,
    Step,
)

CANARIES = {"red": "canaryred", "blue": "canaryblue"}
ONE, TWO, ASKED = "c1 message 0 canaryred", "c1 compute 1 canaryred", "a1 message 1 canaryblue"


def sent(text: str, at: float) -> Sent:
    return Sent(tenant="red", conversation="1", text=text, at=at, seconds=0.1, at_once=True, calls=1)


def run(id_: str, text: str, started: float, steps: int = 1) -> Run:
    return Run(
        tenant="red",
        id=id_,
        session="s1",
        status="completed",
        error=None,
        texts=[text],
        started=started,
        finished=started + 2,
        steps=[Step(n, "model", "completed", 1) for n in range(steps)],
        deliveries=["sent"],
        live="h",
        folded="h",
        timeline=["1970-01-01T00:00:03Z agent: model, asked"],
    )


def account(tenant: str, *usage_ids: str) -> Account:
    return Account(
        tenant=tenant,
        credit_nanos=1000,
        debited_nanos=4 * len(usage_ids),
        held_nanos=0,
        difference=0,
        unsettled=0,
        usage=[Charge(id_, "openai/m", "counted", 4, False) for id_ in usage_ids],
        debits=[(id_, 4) for id_ in usage_ids],
        records=[*usage_ids, *usage_ids],
    )


def good() -> Evidence:
    return Evidence(
        canaries=CANARIES,
        sent=[
            sent(ONE, 1.0),
            sent(TWO, 5.0),
            replace(
                sent(ASKED, 1.0), tenant="blue", conversation="a1", key="k", runs=["r3", "r3", "r3"], other_body=422
            ),
        ],
        forged=1,
        forged_accepted=[],
        replies=[Reply("red", "1", f"You said: {ONE}", 4.5), Reply("red", "1", f"You said: {TWO}", 9.0)],
        calls=[
            ModelCall(ONE, 1, ["red"], 2.5),
            ModelCall(TWO, 1, ["red"], 6.5),
            ModelCall(TWO, 2, ["red"], 7.0),
            ModelCall(ASKED, 1, ["blue"], 2.5),
        ],
        runs=[
            run("r1", ONE, 2.0),
            run("r2", TWO, 6.0, steps=2),
            replace(run("r3", ASKED, 2.0), tenant="blue", session="a1", deliveries=[]),
        ],
        dead_letters=[DeadLetter("d", "billing", "kafka:usage.records", "p", "not JSON", "{")],
        accounts=[account("red", "u1", "u2", "u3"), account("blue", "u4")],
        leaks=[Leak("topics", 9, [])],
        chains=[Chain("", True, 3, 1), Chain("red", True, 2, 1)],
        rebuilt=[Rebuilt("the sums of usage of red", True)],
        poison=[Poison("kafka:usage.records", "p")],
    )
