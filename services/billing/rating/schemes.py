"""Price schemes: the amount for a quantity. Pure, exact, and rounded once.

A price is a fraction of nano-units. An amount is summed exactly and rounded to an integer once, half to even.

- flat: the tier's flat amount if anything was used.
- per_unit: every unit has the price of the only tier.
- graduated: each unit has the price of the tier that it falls into. A tier's flat amount is added as soon as one unit
  falls into it.
- volume: all units have the price of the tier that the last unit falls into; the flat amount of that tier is added.
- package: as graduated, in whole packages: a package that was begun is paid.

A tier holds the units up to and including `up_to`. Included units are free; the tiers count the units after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import msgspec

Scheme = Literal["flat", "per_unit", "graduated", "volume", "package"]


class SchemeTier(msgspec.Struct, frozen=True):
    """A range of units and their price."""

    up_to: int | None
    """The last unit of the tier. None: the tier has no end; only the last tier has none."""
    unit_nanos: Decimal
    """Nano-units per unit; for packages, per package."""
    flat_nanos: int = 0


class Fault(ValueError):
    """A scheme that cannot work. `field` is the path of the wrong value."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


def half_even(numerator: int, divisor: int) -> int:
    """Divides and rounds to the nearest integer, halves to the even one. The divisor is above zero."""
    quotient, rest = divmod(numerator, divisor)
    return quotient + (2 * rest + (quotient & 1) > divisor)


def check(scheme: Scheme, tiers: Sequence[SchemeTier], package_size: int | None) -> None:
    """Raises Fault for tiers that overlap, end too early, or do not fit the scheme."""
    if not tiers:
        raise Fault("tiers", "must not be empty")
    if scheme in ("flat", "per_unit") and len(tiers) > 1:
        raise Fault("tiers", f"must be one tier for the scheme {scheme}")
    if (scheme == "package") != (package_size is not None):
        raise Fault("package_size", "is needed for the scheme package, and for no other scheme")
    below = 0
    for n, tier in enumerate(tiers):
        last = n == len(tiers) - 1
        if last and tier.up_to is not None:
            raise Fault(f"tiers[{n}].up_to", "must be null in the last tier; units above it would have no price")
        if not last and (tier.up_to is None or tier.up_to <= below):
            raise Fault(f"tiers[{n}].up_to", f"must be above {below}, the end of the tier before it")
        below = tier.up_to or 0


def amount(
    scheme: Scheme, tiers: Sequence[SchemeTier], quantity: int, *, included: int = 0, package_size: int = 1
) -> int:
    """Returns the amount for `quantity` units in nano-units. The tiers have passed `check`."""
    units = quantity - included
    if units <= 0:
        return 0
    if scheme == "flat":
        return tiers[0].flat_nanos
    if scheme == "package":
        units = -(-units // package_size)
    if scheme == "volume":
        tier = next(tier for tier in tiers if tier.up_to is None or _ends(scheme, tier, package_size) >= units)
        return _sum([(tier, units)])
    parts = []
    below = 0
    for tier in tiers:
        end = units if tier.up_to is None else min(units, _ends(scheme, tier, package_size))
        if end > below:
            parts.append((tier, end - below))
            below = end
    return _sum(parts)


def _ends(scheme: Scheme, tier: SchemeTier, package_size: int) -> int:
    """The last unit of a tier that has an end; for packages, the package that contains it."""
    assert tier.up_to is not None
    return -(-tier.up_to // package_size) if scheme == "package" else tier.up_to


def _sum(parts: Sequence[tuple[SchemeTier, int]]) -> int:
    """Returns the sum of the tiers' flat amounts and units, rounded once."""
    ratios = [(*tier.unit_nanos.as_integer_ratio(), units, tier.flat_nanos) for tier, units in parts]
    divisor = 1
    for _, denominator, _, _ in ratios:
        divisor *= denominator
    total = sum((n * units * (divisor // d)) + flat * divisor for n, d, units, flat in ratios)
    return half_even(total, divisor)


def part(whole: int, numerator: int, denominator: int) -> int:
    """Returns the share `numerator / denominator` of `whole`, rounded once."""
    return half_even(whole * numerator, denominator)
