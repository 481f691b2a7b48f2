"""Tests of `claw map`: it shows producers and consumers, and differences between catalog and code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from protos.topology import Catalog
from tooling.cli import map as command
from tooling.cli.map import Flow, Party, as_mermaid, as_text, flows
from tooling.testing.sample.catalog import SAMPLE, SAMPLE_EVENTS, SAMPLE_WORK

PACKAGES = {f"sample_{name}": f"tooling.testing.sample.{name}" for name in ("front", "desk", "ledger")}


def parties(catalog: Catalog, packages: dict[str, str], name: str) -> tuple[list[Party], list[Party]]:
    (flow,) = (flow for flow in flows(catalog, packages) if flow.name == name)
    return flow.producers, flow.consumers


def test_subscriptions_and_publishers_are_read_from_the_code() -> None:
    assert parties(SAMPLE, PACKAGES, "sample.events") == (
        [Party("sample_desk", "code")],
        [Party("sample_ledger", "code")],
    )
    assert parties(SAMPLE, PACKAGES, "sample.work") == (
        [Party("sample_front", "code")],
        [Party("sample_desk", "code")],
    )


def test_a_service_without_code_is_only_declared() -> None:
    without = {name: package for name, package in PACKAGES.items() if name == "sample_front"}
    assert parties(SAMPLE, without, "sample.work") == (
        [Party("sample_front", "code")],
        [Party("sample_desk", "declared")],
    )


def test_a_consumer_and_a_producer_that_the_catalog_does_not_name_are_shown() -> None:
    silent = Catalog(
        topics=(replace(SAMPLE_EVENTS, producers=(), consumers=()),),
        queues=(replace(SAMPLE_WORK, consumer="somebody"),),
    )
    assert parties(silent, PACKAGES, "sample.events") == (
        [Party("sample_desk", "undeclared")],
        [Party("sample_ledger", "undeclared")],
    )
    assert parties(silent, PACKAGES, "sample.work")[1] == [
        Party("somebody", "declared"),
        Party("sample_desk", "undeclared"),
    ]


def test_a_consumer_that_subscribes_to_several_queues_in_a_loop_is_not_a_producer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loopy").mkdir()
    (tmp_path / "loopy" / "__init__.py").write_text("")
    (tmp_path / "loopy" / "__main__.py").write_text(
        "from infra.service.service import Service\n"
        "from tooling.testing.sample.catalog import SAMPLE_WORK\n"
        "FAMILY = {'a': SAMPLE_WORK}\n"
        "async def handle(message, tx): ...\n"
        "service = Service('loopy')\n"
        "for queue in FAMILY.values():\n"
        "    service.consume(queue.worker(prefetch=1)(handle))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    producers, consumers = parties(SAMPLE, {"loopy": "loopy"}, "sample.work")
    assert Party("loopy", "undeclared") not in producers
    assert Party("loopy", "undeclared") in consumers


FLOW = Flow("a.b", "topic", "2 partitions", [Party("x", "code")], [Party("y", "declared"), Party("z", "undeclared")])


def test_the_text_marks_declared_and_undeclared_parties() -> None:
    lines = as_text([FLOW]).splitlines()
    assert lines[:4] == ["Kafka topics", "  a.b  (2 partitions)", "    from x", "    to   y*, z!"]


def test_the_arrows_of_declared_parties_are_dotted() -> None:
    assert as_mermaid([FLOW]).splitlines() == [
        "flowchart LR",
        '  a_b[("a.b")]',
        "  x --> a_b",
        "  a_b -.-> y",
        "  a_b --> z",
    ]


def test_the_system_s_map_fits_80_columns_and_comes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    command.map()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    command.map(json=True)
    found = msgspec.json.decode(capsys.readouterr().out, type=list[Flow])
    assert {flow.name for flow in found} >= {"usage.records", "channel.outbound"}
    command.map(mermaid=True)
    assert capsys.readouterr().out.startswith("flowchart LR")


def test_the_calls_are_shown_with_their_callers() -> None:
    text = command.calls_as_text()
    assert "  memory.v1.Memory/Retrieve\n    from agent, plugin for a tenant\n" in text
    assert "  ops.v1.Operations/CountOutbox\n    from billing for a tenant or the operator\n" in text
    assert "  POST /api/v1/runs/{run_id}/cancel\n    from ws_gateway to agent, run" in text
