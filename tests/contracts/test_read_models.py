"""Every table of every service is a source of truth, a read model or work state. A new table without a line is red."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import asyncpg
import pytest

from infra.postgres.schema import migrate, prepare_database
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES
from tooling.testing.platform import PASSWORDS


class Source(NamedTuple):
    """Its rows, or most of their columns, can be made from nothing else."""

    why: str
    models: tuple[str, ...] = ()
    """The read models that other columns belong to."""


class Derived(NamedTuple):
    """A read model: `./claw replay` verifies and repairs it."""

    model: str


class Work(NamedTuple):
    """Something under way: it ends, and later it is not missed."""

    what: str


KERNEL: dict[str, Source | Derived | Work] = {
    "alembic_version": Work("the service's migrations"),
    "consumer_offset": Work("positions of readers"),
    "content_read": Source("who has read what"),
    "dead_letter": Source("messages that could not be handled"),
    "early_message": Work("messages that came before their turn"),
    "erased_tenant": Source("which tenants were erased"),
    "event": Source("the facts"),
    "idempotency": Work("answers of a day"),
    "inbox": Work("ids of handled messages"),
    "kernel_step": Work("the kernel's migrations"),
    "lane": Work("lanes"),
    "lane_effect": Source("calls of other systems and their results"),
    "lane_item": Work("items of lanes"),
    "lease": Work("leases"),
    "lease_member": Work("members of leases"),
    "outbox": Work("messages to publish, and those that may be sent again"),
    "outbox_held_back": Work("destinations that refuse messages"),
    "parked_key": Work("keys behind a dead letter"),
    "read_model": Work("results of verifications"),
    "sequence": Work("positions of messages; a position that was drawn is in its message"),
    "stream": Source("versions of streams, which order appends"),
    "subject_key": Source("keys of persons"),
}
TABLES: dict[str, Source | Derived | Work] = {
    "agent.agent": Source("made by tenants"),
    "agent.agent_version": Source("made by tenants"),
    "agent.delivery": Source("asked replies; the channel tells their end within 7 days, and keeps it in its own list"),
    "agent.message": Source("sealed words of persons, with the run that answers them"),
    "agent.run": Source("who asked, for whom, and what the run may cost", ("agent.runs", "agent.tokens")),
    "agent.run_step": Derived("agent.steps"),
    "agent.run_usage": Source("usage as it was measured"),
    "agent.session": Source("summaries, branches and takeovers", ("agent.sessions",)),
    "billing.account": Source("currency, and what grants have covered", ("billing.balances",)),
    "billing.budget": Source("limits of tenants, with the sum of the running window"),
    "billing.buyer": Source("made by tenants"),
    "billing.channel": Derived("billing.note_channel_types"),
    "billing.credit_grant": Source("credit"),
    "billing.credit_note": Source("documents"),
    "billing.deleted_usage": Source("sums of usage records that are deleted"),
    "billing.delivered": Derived("billing.delivered"),
    "billing.dispute": Source("told by the payment provider"),
    "billing.duplicate": Source("repeated usage"),
    "billing.hold": Work("reserved credit"),
    "billing.invoice": Source("documents"),
    "billing.invoice_line": Source("documents"),
    "billing.invoice_series": Source("numbers of documents"),
    "billing.journal_balance": Derived("billing.journal_balances"),
    "billing.journal_entry": Source("bookings"),
    "billing.journal_line": Source("bookings"),
    "billing.kept_credit": Source("credit"),
    "billing.ledger_entry": Source("bookings"),
    "billing.payment": Source("payments"),
    "billing.payment_event": Source("told by the payment provider"),
    "billing.payment_method": Source("told by the payment provider"),
    "billing.payment_terms": Source("made by operators"),
    "billing.period": Source("periods of subscriptions"),
    "billing.period_correction": Source("bookings"),
    "billing.plan": Source("made by operators"),
    "billing.price": Source("made by operators"),
    "billing.refund": Source("payments"),
    "billing.reported_refund": Source("payments"),
    "billing.subscription": Source("made by operators"),
    "billing.tax_rate": Source("made by operators"),
    "billing.usage": Source("usage with its verdicts"),
    "billing.usage_bucket": Derived("billing.usage_buckets"),
    "billing.usage_correction": Source("bookings"),
    "billing.usage_label": Source("members and tags that tenants have used in a month; rows of usage name them"),
    "channel.accepted": Work("messages on their way into their conversations"),
    "channel.account": Source("made by tenants"),
    "channel.attachment": Source("files in the object store"),
    "channel.conversation": Derived("channel.conversations"),
    "channel.delivery": Derived("channel.deliveries"),
    "channel.inbound_seen": Work("ids of vendors' messages, against repeats"),
    "channel.preview": Work("answers that are being written"),
    "channel.session_alias": Source("told by vendors"),
    "channel.subject_alias": Source("told by vendors"),
    "log_aggregator.audit_head": Source("the end of a chain; made from its records it would hide that one is missing"),
    "log_aggregator.audit_line_key": Source("a key"),
    "log_aggregator.audit_record": Source("the chains; GET /api/v1/audit/verify verifies them"),
    "log_aggregator.audit_verification": Work("results of verifications of the chains"),
    "memory.document": Source("made by tenants; its file is in the object store"),
    "memory.embedding_model": Source("the model of the settings, and those before it"),
    "memory.forgotten_fact": Source("facts that people have forgotten or corrected"),
    "memory.index_engine": Source("made by operators"),
    "memory.index_row": Work("the index in PostgreSQL, filled from the vectors of passages by `./claw memory migrate`"),
    "memory.memory": Derived("memory.memories"),
    "memory.passage": Source("texts and vectors of documents; a newer parser or model would make others"),
    "memory.storage": Source("byte-hours that are not reported yet"),
    "memory.utterance": Source("sealed replies of 30 days; the topic keeps them 7 days, and the journal has no text"),
    "notification.notification": Source("mails and their ends"),
    "notification.webhook_delivery": Work("calls of tenants' endpoints, kept for some days"),
    "notification.webhook_endpoint": Source("made by tenants"),
    "plugin.builtin_off": Source("made by tenants"),
    "plugin.plugin": Source("made by tenants"),
    "plugin.tool": Source("told by the plugin's server"),
    "plugin.tool_call": Source("calls of other systems and their results"),
    "user.api_key": Source("made by tenants"),
    "user.member": Source("made by tenants"),
    "user.tenant": Source("made by operators"),
    "user.tenant_erasure": Source("which services have erased which tenants"),
}


@pytest.fixture(scope="module")
async def tables(database: str) -> set[tuple[str, str]]:
    await prepare_database(database, {name: PASSWORDS for name in SERVICES})
    for name in SERVICES:
        if (revisions := CHECKOUT / "services" / name / "migrations").exists():
            await migrate(database, name, revisions)
    admin = await asyncpg.connect(database)
    found = await admin.fetch(
        """
        SELECT n.nspname, c.relname FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = ANY($1::text[])
        """,
        list(SERVICES),
    )
    await admin.close()
    return {(schema, table) for schema, table in found}


async def test_every_table_has_a_line(tables: set[tuple[str, str]]) -> None:
    own = {f"{schema}.{table}" for schema, table in tables if table not in KERNEL}
    assert own == TABLES.keys()
    assert {table for _, table in tables} >= KERNEL.keys()


def test_the_lines_name_the_read_models_that_the_services_declare() -> None:
    declared: set[tuple[str, str]] = set()
    for name in SERVICES:
        service = import_module(f"services.{name}.__main__").service
        declared |= {(f"{name}.{model.table}", f"{name}.{model.name}") for model in service.read_models}
        for subscription in service.subscriptions:
            handler = subscription.name.rpartition(".")[2]
            declared |= {(f"{name}.{table}", f"{name}.{handler}") for table in subscription.projection or ()}
    named: set[tuple[str, str]] = set()
    for table, line in TABLES.items():
        match line:
            case Source(models=models):
                named |= {(table, model) for model in models}
            case Derived(model):
                named.add((table, model))
            case Work():
                pass
    assert named == declared
