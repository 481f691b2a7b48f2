"""Terms of payment of a tenant, in the table ``payment_terms``."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx

Days = Annotated[int, Field(ge=0, le=365)]


class Terms(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    due_days: Days = 14
    """An invoice is due so many days after it was finalised."""
    reminder_days: Annotated[list[Days], Field(max_length=10)] = [3, 14]
    """An unpaid invoice is reminded of so many days after its due date. Ascending."""
    write_off_days: Days | None = None
    """So many days after its due date an unpaid invoice becomes uncollectible. Null: an operator decides."""

    def steps(self, since: datetime) -> list[datetime]:
        """Returns the times of the reminders and, as the last one, of the write-off if there is one. `since`: the due
        date or, if it is later, the time at which the paid invoice was open again."""
        # Nothing is written off before its due day is over.
        days = self.reminder_days if self.write_off_days is None else [*self.reminder_days, max(1, self.write_off_days)]
        return [since + timedelta(days=n) for n in days]

    def check(self) -> None:
        """Raises InvalidMessage for steps that are not in the order of their time."""
        if self.reminder_days != sorted(set(self.reminder_days)):
            raise InvalidMessage("reminder_days", "must be ascending")
        if self.write_off_days is not None and self.write_off_days <= max(self.reminder_days, default=-1):
            raise InvalidMessage("write_off_days", "must be after the last reminder")


async def get(tx: Tx, tenant_id: str) -> Terms:
    """Returns the tenant's terms, or the ones for all that have none."""
    rows = await tx.sql(
        "SELECT due_days, reminder_days, write_off_days FROM payment_terms WHERE tenant_id = $1", tenant_id
    )
    return Terms(**dict(zip(Terms.model_fields, rows[0], strict=True))) if rows else Terms()


async def put(tx: Tx, tenant_id: str, terms: Terms) -> None:
    """Sets the terms. Due dates stay; the next step of each unpaid invoice follows the new terms."""
    await tx.sql(
        """
        INSERT INTO payment_terms VALUES ($1, $2, $3, $4)
        ON CONFLICT (tenant_id) DO UPDATE
        SET due_days = excluded.due_days, reminder_days = excluded.reminder_days,
            write_off_days = excluded.write_off_days
        """,
        tenant_id,
        terms.due_days,
        terms.reminder_days,
        terms.write_off_days,
    )
    # The step looks at the terms itself and waits again if it is too early.
    await tx.sql(
        "UPDATE invoice SET dunning_at = clock_timestamp() WHERE tenant_id = $1 AND status = 'finalised'", tenant_id
    )
