"""Settings of the ledger."""

from infra.service.settings import Settings


class LedgerSettings(Settings):
    front_grpc: str
