"""What the ledger reads from the environment."""

from infra.service.settings import Settings


class LedgerSettings(Settings):
    front_grpc: str
