"""Ledger of the sample: totals of all notes, by batch, in one transaction with the offset."""

from infra.service import Service
from infra.testing.sample.ledger import adapters, handlers
from infra.testing.sample.ledger.settings import LedgerSettings

service = Service("sample_ledger", LedgerSettings)
service.consume(handlers.count_notes, front=adapters.front)

if __name__ == "__main__":
    service.run()
