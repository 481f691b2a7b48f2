"""The history of one message in order of time: as the client, the model, the vendor and the system saw it."""

from __future__ import annotations

from datetime import UTC, datetime

from tooling.testing.campaign.evidence import Evidence
from tooling.testing.campaign.invariants import Verdict, Violation, reply_to


def shortest(evidence: Evidence, verdict: Verdict) -> tuple[Violation, list[str]] | None:
    """The violation whose message has the shortest history, with it. None if there is no violation."""
    candidates = [(violation, history(evidence, violation.text)) for violation in verdict.violations]
    return min(candidates, key=lambda each: (not each[1], len(each[1])), default=None)


def history(evidence: Evidence, text: str) -> list[str]:
    """One line for each event of the message; empty if the violation belongs to no message."""
    if not text:
        return []
    lines: list[tuple[str, str]] = []
    for one in evidence.sent:
        if one.text == text:
            what = f"client: acknowledged at call {one.calls}, repeated {one.repeats} times; {one.conversation}"
            lines.append((_time(one.at), what))
    for call in evidence.calls:
        if call.text == text:
            lines.append((_time(call.at), f"model: asked, stage {call.stage}"))
    for run in evidence.runs:
        if text in run.texts:
            steps = ", ".join(f"{step.n} {step.kind} {step.status} ({step.attempts})" for step in run.steps)
            lines.append(("", f"run {run.id}: {run.status}; steps {steps}; deliveries {run.deliveries}"))
            for item in run.timeline:
                at, _, what = item.partition(" ")
                lines.append((at, what))
    for reply in evidence.replies:
        if reply.text == reply_to(text):
            lines.append((_time(reply.at), "vendor: shows the reply"))
    return [" ".join(filter(None, line)) for line in sorted(lines)]


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
