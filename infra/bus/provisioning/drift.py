"""A difference between the catalog and a broker, and its text."""

from __future__ import annotations

import msgspec


class ProvisioningError(Exception):
    """A broker refused a request; the message says which and why."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between catalog and broker."""

    subject: str
    """Such as ``topic agent.events`` or ``queue channel.outbound``."""
    what: str
    """Such as ``partitions``."""
    wanted: str
    """The catalog's value; ``-`` if the thing must not exist."""
    found: str
    """The broker's value; ``-`` if the thing does not exist."""
    fixable: bool
    """True if `apply` removes the difference. Otherwise `reason` says why not, and what to do."""
    reason: str
    extra: bool = False
    """True if the thing is not in the catalog. `apply` ignores it."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.what} wanted {self.wanted}, found {self.found}: {self.reason}"


class DriftRefused(ProvisioningError):
    """`apply` found a difference that cannot be removed safely, and has changed nothing."""

    def __init__(self, drifts: list[Drift]) -> None:
        super().__init__("nothing was changed:\n" + "\n".join(f"- {drift}" for drift in drifts))
        self.drifts = drifts


def fixable(subject: str, what: str, *, wanted: object, found: object, reason: str) -> Drift:
    """A difference from the catalog that the provisioning corrects."""
    return Drift(subject=subject, what=what, wanted=str(wanted), found=str(found), fixable=True, reason=reason)


def refused(subject: str, what: str, *, wanted: object, found: object, reason: str) -> Drift:
    """A difference that the provisioning cannot correct without a loss; `reason` says what to do."""
    return Drift(subject=subject, what=what, wanted=str(wanted), found=str(found), fixable=False, reason=reason)


def extra(subject: str, what: str) -> Drift:
    """A thing at the broker that the catalog does not have."""
    reason = "not in the catalog; delete it by hand if it is not used"
    return Drift(subject=subject, what=what, wanted="-", found="there", fixable=False, reason=reason, extra=True)
