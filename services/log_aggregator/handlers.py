"""Handlers of the messages that the log aggregator receives."""

from __future__ import annotations

from infra.bus.dispatch import Decoded
from infra.observe.metrics import Metrics
from infra.postgres.tx import Tx
from protos.catalog import AGENT_EVENTS, AUDIT_LOGS, CHANNEL_EVENTS, SERVICE_LOGS, USAGE_RECORDS
from protos.messages.agent import RunCompleted, RunFailed
from protos.messages.audit import ActAudited
from protos.messages.billing import UsageRecorded
from services.log_aggregator.audit import chains
from services.log_aggregator.index import documents
from services.log_aggregator.index.search_index import CONSUMER_GROUP, SearchIndex

TOKENS = ("input", "cached", "output", "reasoning")


@AUDIT_LOGS.batch(group="log_aggregator")
async def chain_acts(acts: list[ActAudited], tx: Tx) -> None:
    """Appends the acts to their chains in the order of their arrival."""
    records: dict[str, list[str]] = {}
    for act in acts:
        records.setdefault(act.tenant_id or "", []).append(chains.record(act, tx.origins[id(act)]))
    await chains.append(tx, records)


@SERVICE_LOGS.at_least_once(group=CONSUMER_GROUP)
async def index_lines(lines: list[Decoded], index: SearchIndex) -> None:
    await index.store("logs", [documents.line(line) for line in lines])


@AGENT_EVENTS.at_least_once(group=CONSUMER_GROUP)
async def index_agent_events(events: list[Decoded], index: SearchIndex, metrics: Metrics) -> None:
    await index.store("events", [documents.event(event) for event in events])
    for event in events:
        match event.message:
            case RunCompleted():
                metrics.runs.labels("completed").inc()
            case RunFailed(status=status):
                metrics.runs.labels(status).inc()


@USAGE_RECORDS.at_least_once(group=CONSUMER_GROUP)
async def index_usage(records: list[Decoded], index: SearchIndex, metrics: Metrics) -> None:
    await index.store("events", [documents.usage(record) for record in records])
    for record in records:
        if isinstance(record.message, UsageRecorded):
            for kind in TOKENS:
                metrics.tokens.labels(kind).inc(record.message.quantities.get(f"{kind}_tokens", 0))


@AUDIT_LOGS.at_least_once(group=CONSUMER_GROUP)
async def index_acts(acts: list[Decoded], index: SearchIndex) -> None:
    await index.store("audit", [documents.act(act) for act in acts])


@CHANNEL_EVENTS.at_least_once(group=CONSUMER_GROUP)
async def index_channel_events(events: list[Decoded], index: SearchIndex) -> None:
    await index.store("events", [documents.event(event) for event in events])
