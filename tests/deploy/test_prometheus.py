"""The configuration of Prometheus, judged by its own tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tooling.stack.checkout import CHECKOUT

FOLDER = CHECKOUT / "infra" / "deploy" / "prometheus"


def promtool(programs: Path, *arguments: str) -> None:
    done = subprocess.run([programs / "promtool", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_the_rules_are_valid(prometheus_programs: Path) -> None:
    promtool(prometheus_programs, "check", "config", "prometheus.yml")


def test_each_alert_fires_above_its_limit_and_not_below(prometheus_programs: Path) -> None:
    promtool(prometheus_programs, "test", "rules", "alerts.test.yml")
