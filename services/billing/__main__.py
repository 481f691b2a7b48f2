"""Billing: counts each usage record exactly once and debits its cost."""

from infra.observe.metrics import Metrics
from infra.security.subjects import erasure
from infra.service.service import Runtime, Service
from infra.stores.cache import Cache
from services.billing import api, handlers, rpc, tenants
from services.billing.clock import Clock
from services.billing.payments.api import providers
from services.billing.payments.watch import PaymentWatch
from services.billing.settings import BillingSettings
from services.billing.usage.read_models import READ_MODELS


def cache(runtime: Runtime) -> Cache:
    return Cache(runtime.cache)


def metrics(runtime: Runtime) -> Metrics:
    # An alert on an increase does not see the first value of a series.
    for verdict in ("held", "conflict"):
        runtime.metrics.usage_records.labels(verdict)
    return runtime.metrics


service = Service("billing", BillingSettings)
service.project(*READ_MODELS)
service.serve_http(api.routes)
service.serve_grpc(rpc.servicer)
service.consume(handlers.count_usage, metrics=metrics)
service.consume(handlers.open_accounts)
service.consume(handlers.on_quota_exhausted, cache=cache)
service.consume(handlers.on_budget_threshold_passed, cache=cache)
service.consume(handlers.count_messages, metrics=metrics)
service.consume(handlers.note_channel_types)
service.consume(erasure("billing"))
service.erase_tenants(tenants.KEPT, tenants.end_billing)
service.beside("clock", lambda runtime: Clock(runtime.worker, runtime.settings.seller, providers(runtime)))
service.beside("payment watch", lambda runtime: PaymentWatch(runtime.worker, runtime.metrics))

if __name__ == "__main__":
    service.run()
