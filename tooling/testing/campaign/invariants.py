"""The nine invariants. Each is a pure function of the evidence, and counts the things that it has checked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise

import msgspec

from tooling.testing.campaign.evidence import TOOL_WORD, Evidence, Run, Sent

ENDED_WELL = ("completed", "refused")
WAY = ("channel", "agent")
"""The services that a message passes until its reply. Others have copies of it."""


class Violation(msgspec.Struct):
    """`text`: the message that shows it; empty if it belongs to no message."""

    what: str
    text: str = ""


class Verdict(msgspec.Struct):
    """The result of an invariant."""

    name: str
    promise: str
    unit: str
    """The name of the things that were checked."""
    checked: int
    violations: list[Violation]

    @property
    def held(self) -> bool:
        """An invariant that has checked nothing has shown nothing."""
        return not self.violations and self.checked > 0


Check = Callable[[Evidence], Iterator[Violation | int]]
"""Yields violations, and the numbers of checked things."""


def judge(evidence: Evidence) -> list[Verdict]:
    verdicts = []
    for name, (promise, unit, check) in INVARIANTS.items():
        found = list(check(evidence))
        verdicts.append(
            Verdict(
                name,
                promise,
                unit,
                sum(one for one in found if isinstance(one, int)),
                [one for one in found if isinstance(one, Violation)],
            )
        )
    return verdicts


def _accepted(evidence: Evidence) -> Iterator[Violation | int]:
    runs = _runs_by_text(evidence)
    for one in evidence.sent:
        yield 1
        mine = runs.get(one.text, [])
        dead = [letter for letter in evidence.dead_letters if letter.service in WAY and one.text in letter.payload]
        if not mine and not dead:
            yield Violation("acknowledged, and neither a run nor a dead letter has it", one.text)
        if len(mine) > 1:
            yield Violation(f"{len(mine)} runs answer it", one.text)
        for run in mine:
            if run.status not in ENDED_WELL and not dead:
                yield Violation(f"its run is {run.status}: {run.error}", one.text)
    known = {one.text for one in evidence.sent}
    for text in runs.keys() - known:
        yield Violation("a run answers a message that was never acknowledged", text)
    for text in evidence.forged_accepted:
        yield Violation("a forged webhook was answered 200", text)
    parked = {letter.message_id for letter in evidence.dead_letters}
    for poison in evidence.poison:
        if poison.message_id not in parked:
            yield Violation(f"poison in {poison.source} has no visible dead letter: {poison.message_id}")
    for problem in evidence.problems:
        yield Violation(problem)


def _one_reply(evidence: Evidence) -> Iterator[Violation | int]:
    shown: dict[str, list[str]] = defaultdict(list)
    for reply in evidence.replies:
        shown[reply.text].append(reply.tenant)
    due = set()
    runs = _runs_by_text(evidence)
    for one in evidence.of_channels():
        due.add(reply_to(one.text))
        for run in runs.get(one.text, []):
            if run.status != "completed":
                continue
            yield 1
            times = len(shown[reply_to(one.text)])
            if times > 1:
                yield Violation(f"{times} replies to it are visible", one.text)
            elif times == 0 and "unknown" not in run.deliveries:
                yield Violation(f"its run completed, and no reply is visible; deliveries: {run.deliveries}", one.text)
    for reply in evidence.replies:
        if reply.text not in due:
            yield Violation(f"a reply that answers no message: {reply.text!r} in {reply.conversation}")


def _money(evidence: Evidence) -> Iterator[Violation | int]:
    for account in evidence.accounts:
        who = account.tenant
        counted = {charge.usage_id: charge.amount_nanos for charge in account.usage if charge.verdict == "counted"}
        produced = set(account.records)
        yield len(produced)
        for usage_id in sorted(produced - {charge.usage_id for charge in account.usage}):
            yield Violation(f"{who}: usage {usage_id} is on the topic and has no verdict")
        for usage_id in sorted({charge.usage_id for charge in account.usage if not _own(charge.resource)} - produced):
            yield Violation(f"{who}: usage {usage_id} has a verdict and was never on the topic")
        debits = Counter(usage_id for usage_id, _ in account.debits)
        for usage_id, times in debits.items():
            if times > 1:
                yield Violation(f"{who}: usage {usage_id} is debited {times} times")
        amounts = dict(account.debits)
        for usage_id, amount in counted.items():
            if amounts.get(usage_id, 0) != amount:
                yield Violation(f"{who}: usage {usage_id} is rated {amount}, debited {amounts.get(usage_id, 0)}")
        total = sum(amount for _, amount in account.debits)
        if not total == sum(counted.values()) == account.debited_nanos:
            yield Violation(
                f"{who}: distinct usage costs {sum(counted.values())}, the ledger has {total}, the account "
                f"{account.debited_nanos}"
            )
        if account.debited_nanos > account.credit_nanos:
            yield Violation(f"{who}: {account.debited_nanos} spent of a credit of {account.credit_nanos}")
        if account.held_nanos:
            yield Violation(f"{who}: {account.held_nanos} are still held")
        if account.difference or account.unsettled:
            yield Violation(f"{who}: reconciliation differs by {account.difference}, {account.unsettled} not settled")
        mine = [run for run in evidence.runs if run.tenant == who]
        answers = sum(step.status == "completed" for run in mine for step in run.calls_of_model())
        billed = sum(charge.resource.startswith("openai/") and not charge.estimated for charge in account.usage)
        if answers != billed:
            yield Violation(f"{who}: {answers} completed calls of the model, {billed} are billed")


def _own(resource: str) -> bool:
    """Billing makes the records of delivered messages itself, without the topic."""
    return resource == "channel/message"


def _sessions(evidence: Evidence) -> Iterator[Violation | int]:
    sessions: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in evidence.runs:
        sessions[run.tenant, run.session].append(run)
    for text in evidence.asked_twice:
        yield Violation("two processes handle its run at the same time: both ask the model", text)
    answered: dict[str, list[str]] = {}
    for runs in sessions.values():
        runs.sort(key=lambda run: (run.started or float("inf"), run.id))
        yield 1
        for before, after in pairwise(runs):
            if before.finished is None or (after.started is not None and after.started < before.finished):
                text = (after.texts or [""])[0]
                yield Violation(f"run {after.id} began before run {before.id} of its session ended", text)
        texts = [text for run in runs for text in run.texts]
        for text in texts:
            answered.setdefault(text, texts)
    shown: dict[tuple[str, str], list[str]] = defaultdict(list)
    for reply in evidence.replies:
        shown[reply.tenant, reply.conversation].append(reply.text)
    conversations: dict[tuple[str, str], list[Sent]] = defaultdict(list)
    for one in evidence.sent:
        conversations[one.tenant, one.conversation].append(one)
    for key, sent in conversations.items():
        sent.sort(key=lambda one: one.at)
        first = next((answered[one.text] for one in sent if one.text in answered), [])
        for expected, found in zip([one.text for one in sent], first, strict=False):
            if expected != found:
                yield Violation(f"out of order in {key[1]}: came {expected!r}, was answered {found!r}", expected)
                break
        if len(first) < len(sent):
            missing = next(one.text for one in sent if one.text not in first)
            yield Violation(f"a gap in {key[1]}: {len(first)} of {len(sent)} messages are in its session", missing)
        due = [reply_to(one.text) for one in sent]
        if shown[key] and not _is_in_order(shown[key], due):
            yield Violation(f"the replies in {key[1]} are not in the order of its messages", sent[0].text)


def _is_in_order(shown: list[str], due: list[str]) -> bool:
    place = {text: n for n, text in enumerate(due)}
    places = [place[text] for text in dict.fromkeys(shown) if text in place]
    return places == sorted(places)


def _replay(evidence: Evidence) -> Iterator[Violation | int]:
    for run in evidence.runs:
        yield 1
        if run.live != run.folded:
            yield Violation(
                f"run {run.id}: its journal folds to another state than the stored one", (run.texts or [""])[0]
            )
    for one in evidence.rebuilt:
        yield 1
        if not one.equal:
            yield Violation(f"{one.what} differs when it is computed again from zero. {one.note}".strip())


def _canaries(evidence: Evidence) -> Iterator[Violation | int]:
    for leak in evidence.leaks:
        yield leak.searched
        for found in leak.found:
            yield Violation(f"{leak.place}: {found}")
    for call in evidence.calls:
        yield 1
        if len(call.canaries) != 1:
            yield Violation(f"a request to the model has the canaries of {call.canaries}", call.text)
    for reply in evidence.replies:
        yield 1
        for tenant, canary in evidence.canaries.items():
            if tenant != reply.tenant and canary in reply.text:
                yield Violation(f"the canary of {tenant} is in a reply of {reply.tenant}: {reply.text!r}")


def _keys(evidence: Evidence) -> Iterator[Violation | int]:
    for one in evidence.sent:
        if not one.key:
            continue
        yield len(one.runs)
        if len(set(one.runs)) > 1:
            yield Violation(f"key {one.key} gave {len(set(one.runs))} runs: {sorted(set(one.runs))}", one.text)
        if one.other_body is not None:
            yield 1
            if one.other_body != 422:
                yield Violation(f"key {one.key} with another body was answered {one.other_body}, not 422", one.text)


def _audit(evidence: Evidence) -> Iterator[Violation | int]:
    for chain in evidence.chains:
        yield chain.records
        name = f"of {chain.owner}" if chain.owner else "of the system"
        if not chain.ok:
            yield Violation(f"the audit chain {name} does not verify after record {chain.records}")
        if not chain.stored_heads:
            yield Violation(f"no head of the audit chain {name} is stored outside of the database")


def _steps(evidence: Evidence) -> Iterator[Violation | int]:
    asked: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for call in evidence.calls:
        asked[call.text][call.stage].append(call.at)
    for text, runs in _runs_by_text(evidence).items():
        calls = asked[text]
        # A summary of a long conversation may come before them.
        expected = 2 if f" {TOOL_WORD} " in text else 1
        steps = [step for run in runs for step in run.calls_of_model()[-expected:]]
        yield len(steps)
        for stage, step in enumerate(steps, 1):
            times = len(calls[stage])
            if step.status == "completed" and times == 0:
                yield Violation(f"model step {step.n} completed, and the model was not asked", text)
            if times > step.attempts:
                yield Violation(f"model step {step.n} has {step.attempts} attempts, the model was asked {times}", text)
        if calls[1] and calls[2] and max(calls[1]) > min(calls[2]):
            yield Violation("its first call of the model was made again after it had completed", text)
        ends = [run.finished for run in runs if run.finished]
        latest = max((at for times in calls.values() for at in times), default=0.0)
        if ends and latest > max(ends):
            yield Violation("the model was asked after its run had ended", text)


def reply_to(text: str) -> str:
    """The fake model's answer."""
    return f"You said: {text}"


def _runs_by_text(evidence: Evidence) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = defaultdict(list)
    for run in evidence.runs:
        for text in run.texts:
            found[text].append(run)
    return found


INVARIANTS: dict[str, tuple[str, str, Check]] = {
    "I1": ("each accepted message has one run that completed or was refused, or a dead letter", "messages", _accepted),
    "I2": ("each completed run has one visible reply, or one delivery that is unknown", "runs", _one_reply),
    "I3": ("the ledger equals the distinct usage, to the nano-unit, and no credit is overspent", "records", _money),
    "I4": ("in a session no runs overlap, no message is missing, and all are in order", "sessions", _sessions),
    "I5": ("states that are computed again from zero equal the live ones, by hash", "states", _replay),
    "I6": ("no tenant's canary is with another tenant, in logs, topics, searches or streams", "places", _canaries),
    "I7": ("the same idempotency key gives the same run; with another body it is refused", "calls", _keys),
    "I8": ("the audit chains verify, and their heads are stored outside of the database", "records", _audit),
    "I9": ("no completed step runs again", "steps", _steps),
}
