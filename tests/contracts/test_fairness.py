"""The work of one tenant, however slow, leaves places for the others."""

from __future__ import annotations

from importlib import import_module

from tooling.stack.home import SERVICES

# Items that wait for nothing that a tenant has set up, and take no longer for one tenant than for another. Tenants have
# turns in all lanes.
SHORT = {
    *("erased tenants", "erased files", "documents of deleted messages"),
    *("message gaps", "delivery gaps", "utterances", "memories", "emails", "uploads"),
}


def test_no_tenant_can_hold_all_places_of_a_kind_of_work() -> None:
    whole = set()
    for name in SERVICES:
        service = import_module(f"services.{name}.__main__").service
        whole |= {work.lane.name for work, _ in service.works if work.per_tenant == work.concurrency}
    assert whole == SHORT
