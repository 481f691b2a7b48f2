"""All metrics in one place."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from infra.observe.metrics import Metrics


def test_several_processes_in_one_test_do_not_share_their_figures() -> None:
    one, other = Metrics(CollectorRegistry()), Metrics(CollectorRegistry())
    one.retries.labels("billing.count_usage").inc()
    assert 'claw_retries_total{consumer="billing.count_usage"} 1.0' in generate_latest(one.registry).decode()
    assert 'claw_retries_total{consumer="billing' not in generate_latest(other.registry).decode()


def test_every_name_has_the_product_s_prefix() -> None:
    names = {metric.name for metric in Metrics(CollectorRegistry()).registry.collect()}
    assert {name for name in names if not name.startswith("claw_")} <= {
        "process_virtual_memory_bytes",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_cpu_seconds",
        "process_open_fds",
        "process_max_fds",
        "python_info",
    }
    assert len(names) > 20
