"""Payments that a person has to look at, as a metric."""

from __future__ import annotations

from datetime import timedelta

from infra.clock import utcnow
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.service.periodic import Periodic
from services.billing.payments import store

# Events of payments that another system makes with the same account at the provider stay unmatched.
_COUNTED = timedelta(days=7)


class PaymentWatch(Periodic):
    """Runs until stopped. Each process shows the same figures."""

    pause = 60.0
    failure = "could not count the payments that a person has to look at"

    def __init__(self, database: Database, metrics: Metrics) -> None:
        super().__init__()
        self._database = database
        self._metrics = metrics

    async def tick(self) -> None:
        async with self._database.begin() as tx:
            cases = await store.open_cases(tx, utcnow() - _COUNTED)
        for reason, count in cases._asdict().items():
            self._metrics.payment_cases.labels(reason).set(count)
