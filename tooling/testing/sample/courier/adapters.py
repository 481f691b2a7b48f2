"""The external office."""

from __future__ import annotations

from dataclasses import dataclass

from infra.errors import EffectFailed, Unanswered
from infra.outgoing.client import Outgoing
from infra.service.service import Runtime


@dataclass(frozen=True)
class Office:
    """Takes parcels by HTTP, each with an idempotency key."""

    outgoing: Outgoing
    url: str

    async def hand_in(self, street: str, number: int, key: str) -> int:
        """Returns the receipt's number. Raises EffectFailed if the office refuses the parcel."""
        answer = await self.outgoing.request(
            "POST", self.url, headers={"idempotency-key": key}, json={"street": street, "number": number}
        )
        if answer.status == 200:
            return int(answer.body)
        if answer.status < 500:
            raise EffectFailed(f"the office answers {answer.status}")
        raise Unanswered(f"the office answers {answer.status}")


def office(runtime: Runtime) -> Office:
    return Office(runtime.outgoing, runtime.settings.office_url)
