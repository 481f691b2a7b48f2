"""Log aggregator: audit chains, searchable logs and traces, and the dead letters of all services."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.log_aggregator import adapters, api, handlers, otlp
from services.log_aggregator.audit import lines
from services.log_aggregator.audit.stored_heads import Keeper
from services.log_aggregator.audit.verification import Verifier
from services.log_aggregator.settings import LogAggregatorSettings

service = Service("log_aggregator", LogAggregatorSettings)
service.seal(lines.SEALED)
service.serve_http(api.routes)
service.beside("OTLP receiver", otlp.receiver)
service.beside("heads of the audit chains", lambda runtime: Keeper(runtime.worker, adapters.stored_heads(runtime)))
service.beside(
    "verification of the audit chains",
    lambda runtime: Verifier(runtime.worker, adapters.stored_heads(runtime), runtime.metrics),
)
service.depend("opensearch", adapters.opensearch)
service.consume(handlers.chain_acts)
service.consume(handlers.index_lines, index=adapters.index)
service.consume(handlers.index_agent_events, index=adapters.index, metrics=adapters.metrics)
service.consume(handlers.index_channel_events, index=adapters.index)
service.consume(handlers.index_usage, index=adapters.index, metrics=adapters.metrics)
service.consume(handlers.index_acts, index=adapters.index)
service.consume(erasure("log_aggregator"))
service.erase_tenants(("audit_record", "audit_head", "audit_verification"))

if __name__ == "__main__":
    service.run()
