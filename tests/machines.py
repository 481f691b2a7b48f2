"""Hypothesis's state machines as the suite runs them."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

# The same examples each time; CLAW_MODEL_EXAMPLES=<how many> tries that many others instead.
EXAMPLES = int(os.environ.get("CLAW_MODEL_EXAMPLES", 0))
# Time to find the shortest example of a failure.
patient = pytest.mark.timeout(0 if EXAMPLES else 600)


def run_machine(machine: type[RuleBasedStateMachine], world: object, *, examples: int, steps: int) -> None:
    """Tries so many examples of so many steps. `world`: the machine's own attribute, one for all examples."""
    run_state_machine_as_test(
        type(machine.__name__, (machine,), {"world": world}),
        settings=settings(
            max_examples=EXAMPLES or examples,
            stateful_step_count=steps,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        ),
    )
