"""Ledger of the sample: totals of all notes, by batch, in one transaction with the offset."""

from infra.service.service import Service
from tooling.testing.sample.ledger import adapters, handlers
from tooling.testing.sample.ledger.settings import LedgerSettings

service = Service("sample_ledger", LedgerSettings)
service.consume(handlers.count_notes, front=adapters.front)

if __name__ == "__main__":
    service.run()
