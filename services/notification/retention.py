"""Deletes old notifications and webhook deliveries, also of tenants that have no new ones."""

from __future__ import annotations

from infra.postgres.database import Database
from infra.service.periodic import Periodic
from services.notification import notifications
from services.notification.webhooks import endpoints

# Rows of one transaction.
BATCH = 10_000


class Retention(Periodic):
    """Runs until stopped; several processes may run it."""

    pause = 3600.0
    failure = "could not delete old notifications and webhook deliveries"

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    async def tick(self) -> None:
        for forget in (notifications.forget, endpoints.forget):
            deleted = BATCH
            while deleted == BATCH and not self._stopping.is_set():
                async with self._database.begin() as tx:
                    deleted = await forget(tx, BATCH)
