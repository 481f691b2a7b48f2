"""The evidence at the end of a campaign: the ledgers of clients, vendors and model, and the system's own answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import msgspec

# A message with this word needs a tool, so its run asks the model twice.
TOOL_WORD = "compute"


class Sent(msgspec.Struct, kw_only=True):
    """A message of the client. Times are Unix seconds."""

    tenant: str
    conversation: str
    text: str
    at: float
    """When it was acknowledged: 200 for a webhook, 202 for a call of the API."""
    seconds: float
    """How long the first call for it took, with its answer or failure."""
    at_once: bool
    """The first call was acknowledged."""
    calls: int
    """Calls until the acknowledgement."""
    repeats: int = 0
    """Calls with the same message after its acknowledgement."""
    key: str = ""
    """The idempotency key of a call of the API; empty for a webhook."""
    runs: list[str] = []
    """For a call of the API: the run of each of the calls that were acknowledged."""
    other_body: int | None = None
    """The status of a call with the same key and another body; None if there was none."""


class Reply(msgspec.Struct):
    """A message that a vendor has accepted and shows."""

    tenant: str
    conversation: str
    text: str
    at: float


class ModelCall(msgspec.Struct):
    """A request that the model has got."""

    text: str
    """The last text of a person in it; empty if it asks for a summary of the conversation."""
    stage: int
    """1: it asks for the first answer to the text. 2: it brings the result of a tool."""
    canaries: list[str]
    """The tenants whose canary it contains."""
    at: float


class Step(msgspec.Struct):
    n: int
    kind: str
    status: str
    attempts: int


class Run(msgspec.Struct, kw_only=True):
    """A run as the API shows it, with its timeline. Times are Unix seconds."""

    tenant: str
    id: str
    session: str
    status: str
    error: str | None
    texts: list[str]
    """The messages that it answers, in their order."""
    started: float | None
    finished: float | None
    steps: list[Step]
    deliveries: list[str]
    """The states of its deliveries."""
    live: str
    """SHA-256 of its state and steps as stored."""
    folded: str
    """SHA-256 of the same, folded from the journal from its first event on."""
    timeline: list[str]
    """Its timeline, one line for each item."""

    def calls_of_model(self) -> list[Step]:
        return [step for step in self.steps if step.kind == "model"]


class DeadLetter(msgspec.Struct):
    id: str
    service: str
    source: str
    message_id: str
    error: str
    payload: str


class Charge(msgspec.Struct):
    """The verdict on a usage record."""

    usage_id: str
    resource: str
    verdict: str
    amount_nanos: int
    estimated: bool


class Account(msgspec.Struct, kw_only=True):
    """The money of one tenant, in 10⁻⁹ of its currency."""

    tenant: str
    credit_nanos: int
    debited_nanos: int
    held_nanos: int
    difference: int
    """Of the reconciliation."""
    unsettled: int
    """Records that are pending, held or rejected."""
    usage: list[Charge]
    debits: list[tuple[str, int]]
    """The charges in the ledger: usage id and amount, above zero."""
    records: list[str]
    """The usage ids of all records of the tenant on the topic, repeats included."""


class Leak(msgspec.Struct):
    """A place that was searched for the canaries of tenants."""

    place: str
    searched: int
    """How many records, lines or answers."""
    found: list[str]
    """Those with a canary of another tenant than the one they belong to."""


class Chain(msgspec.Struct):
    """An audit chain after its verification. `owner`: the tenant; empty for the system's own."""

    owner: str
    ok: bool
    records: int
    stored_heads: int
    """Heads in the object store."""


class Rebuilt(msgspec.Struct):
    """Something that was computed again from its source. `equal`: the hashes are."""

    what: str
    equal: bool
    note: str = ""


class Poison(msgspec.Struct):
    """A message that no consumer can read."""

    source: str
    """``kafka:<topic>`` or ``rabbit:<queue>``."""
    message_id: str


class Evidence(msgspec.Struct, kw_only=True):
    canaries: Mapping[str, str]
    """Tenant → its canary."""
    sent: list[Sent]
    forged: int
    """Forged webhooks that were sent."""
    forged_accepted: list[str]
    """The texts of those that were answered 200."""
    replies: list[Reply]
    calls: list[ModelCall]
    runs: list[Run]
    dead_letters: list[DeadLetter]
    accounts: list[Account]
    leaks: list[Leak]
    chains: list[Chain]
    rebuilt: list[Rebuilt]
    poison: list[Poison]
    asked_twice: list[str] = []
    """Texts for which a second process asked the model while a first one, which ran, waited for the same answer."""
    problems: list[str] = []
    """Why the campaign could not be carried out, and questions that the system did not answer in time. They count
    against I1."""

    def of_channels(self) -> list[Sent]:
        return [one for one in self.sent if not one.key]

    def unplanned(self) -> dict[str, int]:
        """Dead letters that no poison explains: consumer and error → their number."""
        poison = {one.message_id for one in self.poison}
        letters = [letter for letter in self.dead_letters if letter.message_id not in poison]
        return dict(Counter(f"{one.service} {one.source}: {one.error[:100]}" for one in letters))
