"""The courier's lane and its runner."""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

import msgspec

from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.postgres.tx import Tx
from tooling.testing.sample.courier.adapters import Office


class Parcel(msgspec.Struct, frozen=True):
    """The parcel with this number in its street, and the kind of effect of its delivery."""

    street: str
    number: int
    effect: Literal["repeatable", "keyed", "once"]


PARCELS = Lane("parcels", Parcel, retries=(timedelta(milliseconds=100), timedelta(seconds=1)))


@PARCELS.runner(concurrency=8)
async def deliver(parcel: Parcel, effects: Effects, tx: Tx, office: Office) -> None:
    outcome = await effects.run(
        f"{parcel.street} {parcel.number}",
        lambda key: office.hand_in(parcel.street, parcel.number, key),
        kind=parcel.effect,
        result=int,
    )
    await tx.sql(
        "INSERT INTO delivery (street, number, state) VALUES ($1, $2, $3)", parcel.street, parcel.number, outcome.state
    )
