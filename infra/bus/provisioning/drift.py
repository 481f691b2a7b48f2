"""What differs between the catalog and a broker, and how it is said."""

from __future__ import annotations

import msgspec


class ProvisioningError(Exception):
    """A broker refused a request; the message says which and why."""


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One difference between catalog and broker.

    subject: such as ``topic agent.events`` or ``queue channel.outbound``; what: such as ``partitions``.
    wanted, found: ``-`` where there should be, or is, nothing.
    fixable: `apply` changes it; otherwise `reason` says why not and what to do.
    extra: the catalog does not know it. It is left alone and does not hinder `apply`.
    """

    subject: str
    what: str
    wanted: str
    found: str
    fixable: bool
    reason: str
    extra: bool = False

    def __str__(self) -> str:
        return f"{self.subject}: {self.what} wanted {self.wanted}, found {self.found}: {self.reason}"


class DriftRefused(ProvisioningError):
    """`apply` met what cannot be changed safely, and has changed nothing."""

    def __init__(self, drifts: list[Drift]) -> None:
        super().__init__("nothing was changed:\n" + "\n".join(f"- {drift}" for drift in drifts))
        self.drifts = drifts


def fixable(subject: str, what: str, *, wanted: object, found: object, reason: str) -> Drift:
    return Drift(subject=subject, what=what, wanted=str(wanted), found=str(found), fixable=True, reason=reason)


def refused(subject: str, what: str, *, wanted: object, found: object, reason: str) -> Drift:
    return Drift(subject=subject, what=what, wanted=str(wanted), found=str(found), fixable=False, reason=reason)


def extra(subject: str, what: str) -> Drift:
    reason = "not in the catalog; delete it by hand if nobody uses it"
    return Drift(subject=subject, what=what, wanted="-", found="there", fixable=False, reason=reason, extra=True)
