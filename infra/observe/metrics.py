"""Every Prometheus metric of a service process, names and labels in one place."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

# From a fast handler to the slowest answer for which a person still waits.
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

SLOW_STATEMENT_SECONDS = 0.5


class Statements(Collector):
    """The statements and commands of a process to PostgreSQL, and the time that transactions waited for a connection,
    as plain numbers: a histogram costs more at each."""

    def __init__(self) -> None:
        self._all = 0
        self._slow = 0
        self._waited = 0.0

    def took(self, seconds: float) -> None:
        self._all += 1
        self._slow += seconds > SLOW_STATEMENT_SECONDS

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily("claw_db_statements", "Statements to PostgreSQL that ended", self._all)
        yield CounterMetricFamily(
            "claw_db_slow_statements", "Statements to PostgreSQL that took more than half a second", self._slow
        )
        # A tenant alone has half of a pool: more of its transactions wait while the pool is not full.
        yield CounterMetricFamily(
            "claw_db_pool_wait_seconds", "Time that transactions waited for a connection to PostgreSQL", self._waited
        )


STATEMENTS = Statements()
"""Those of this process."""


class Metrics:
    """The metrics of one process, on a registry of their own: one test may hold several."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def gauge(name: str, help_: str, *labels: str) -> Gauge:
            return Gauge(name, help_, labels, registry=registry)

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(name, help_, labels, registry=registry)

        def histogram(name: str, help_: str, *labels: str) -> Histogram:
            return Histogram(name, help_, labels, registry=registry, buckets=_SECONDS)

        # Outbox. A growing oldest age means that the bus is away or a destination refuses messages.
        self.outbox_depth = gauge("claw_outbox_depth", "Messages not yet published", "bus", "destination")
        self.outbox_oldest_seconds = gauge(
            "claw_outbox_oldest_seconds", "Age of the oldest message not yet published", "bus", "destination"
        )
        self.outbox_published = counter("claw_outbox_published_total", "Messages that the bus confirmed", "bus")
        self.outbox_failures = counter("claw_outbox_failures_total", "Messages refused or not confirmed", "bus")

        # Kafka readers, by consumer group. Lag without progress means a stuck consumer.
        self.lag_records = gauge(
            "claw_consumer_lag_records",
            "Records in the log not yet processed",
            "consumer",
            "topic",
            "partition",
        )
        self.lag_seconds = gauge(
            "claw_consumer_lag_seconds",
            "Age of the last processed record, 0 when all is read",
            "consumer",
            "topic",
            "partition",
        )
        self.last_progress = gauge(
            "claw_consumer_last_progress_timestamp_seconds", "When a batch was last committed", "consumer"
        )
        self.assigned_partitions = gauge("claw_consumer_partitions", "Partitions assigned", "consumer")
        self.rebalances = counter("claw_consumer_rebalances_total", "Times partitions were assigned", "consumer")
        self.partition_stopped = gauge(
            "claw_consumer_partition_stopped",
            "1 while a partition is stopped: the stored offset is not in the log, or a batch is damaged",
            "consumer",
            "topic",
            "partition",
        )

        # Messages of either bus. Outcome: handled, repeat, retried, dead.
        self.processed = counter("claw_messages_total", "Messages processed", "consumer", "outcome")
        self.processing_seconds = histogram(
            "claw_processing_seconds", "Time for one message or one batch, commit included", "consumer"
        )
        self.retries = counter("claw_retries_total", "Failed attempts that will be retried", "consumer")
        # Each consumer asks for its series when it is made, so that it begins at 0: an alert on an increase does not
        # see the first value of a series.
        self.dead_letters = counter("claw_dead_letters_total", "Messages that became dead letters", "consumer")
        # An open dead letter is discarded 30 days after its last failure.
        self.dead_letters_open = gauge(
            "claw_dead_letters_open", "Dead letters not yet redriven or discarded", "consumer"
        )
        self.dead_letter_oldest_seconds = gauge(
            "claw_dead_letter_oldest_seconds", "Time since the first failure of the oldest open dead letter", "consumer"
        )
        self.parked_keys = gauge(
            "claw_parked_keys", "Keys with records that wait behind a failed one", "consumer", "topic"
        )
        # Of the last verification; 0 if it was repaired. The time is shown if the nightly verification is on.
        self.read_model_different_rows = gauge(
            "claw_read_model_different_rows", "Rows of a read model that differ from their source", "model"
        )
        self.read_model_verified = gauge(
            "claw_read_model_verified_timestamp_seconds", "When a read model was last verified, 0: never", "model"
        )

        # Lanes. Outcome: done, expired, waiting (its turn has not come), retried (after a fault), dead, lost (another
        # process holds the lane now). A growing oldest age means too few runners, or an item that holds its lane.
        self.lane_depth = gauge("claw_lane_depth", "Items not yet done", "kind")
        self.lane_oldest_seconds = gauge("claw_lane_oldest_seconds", "How long the oldest item has been due", "kind")
        self.lane_items = counter("claw_lane_items_total", "Attempts at items of lanes", "kind", "outcome")
        self.lane_seconds = histogram("claw_lane_seconds", "Time for one item of a lane, commit included", "kind")
        # A process died over its lanes, or was slower than its leases.
        self.lane_takeovers = counter(
            "claw_lane_takeovers_total", "Lanes claimed after the lease of their owner", "kind"
        )
        # Kind: repeatable, keyed, once. State: succeeded, failed, unknown (an operator decides).
        self.effects = counter("claw_effects_total", "Effects in the outside world that ended", "kind", "state")

        # Counted by the log aggregator, from the events. Status: completed, failed, cancelled, refused.
        self.runs = counter("claw_runs_total", "Runs of agents that ended", "status")

        # Counted by the log aggregator, from usage records as they were reported; a redelivered record counts again.
        # Kind: input (cached ones included), cached, output (reasoning included), reasoning.
        self.tokens = counter("claw_tokens_total", "Tokens of models", "kind")
        # Counted by billing. Verdict: counted, duplicate, held, rejected. Held usage is not charged until an operator
        # has decided.
        self.usage_records = counter("claw_usage_records_total", "Usage records rated", "verdict")
        # A float: for graphs, not for accounts. The ledger is exact.
        self.cost_nanos = counter("claw_cost_nanos_total", "Cost of usage in 10^-9 of the currency", "currency")
        # unmatched: events of the last week about payments that are not known. after_erasure: credit that was paid
        # after the erasure of its tenant.
        self.payment_cases = gauge("claw_payment_cases", "Payments that a person has to look at", "reason")

        # Set by the log aggregator. A broken chain stays broken until a person has looked at it.
        self.audit_chains_broken = gauge("claw_audit_chains_broken", "Audit chains whose last verification failed")
        self.audit_unverified_seconds = gauge(
            "claw_audit_unverified_seconds", "Time since the audit chain that was verified least recently was verified"
        )

        # Connections to PostgreSQL. A pool that stays full makes requests and lanes wait.
        self.db_pool_used_ratio = gauge("claw_db_pool_used_ratio", "Part of the connections in use, 0 to 1", "pool")
        registry.register(STATEMENTS)

        # If PostgreSQL archives its WAL. Segments that cannot be archived fill its disk.
        self.wal_archived_age_seconds = gauge(
            "claw_wal_archived_age_seconds", "Time since WAL was last archived, or since the start of the server"
        )

        # A page that does not fit its checksum is never read as data: the statement fails.
        self.damaged_pages = gauge("claw_db_damaged_pages", "Reads of PostgreSQL that met a damaged page")

        # Of the service's own certificate, as it was read at the start. 0 without TLS.
        self.certificate_end = gauge(
            "claw_certificate_end_timestamp_seconds", "Until when the certificate of the service is valid"
        )

        # Requests served.
        self.http_seconds = histogram("claw_http_request_seconds", "HTTP requests served", "method", "route", "status")
        self.grpc_seconds = histogram("claw_grpc_request_seconds", "gRPC calls served", "method", "code")

        # The queue was full, or the collector did not take them.
        self.spans_dropped = counter("claw_spans_dropped_total", "Spans not sent to the collector")
        # Lines that did not reach the log topic; they are on stdout.
        self.log_lines_dropped = counter("claw_log_lines_dropped_total", "Log lines not sent to Kafka")
