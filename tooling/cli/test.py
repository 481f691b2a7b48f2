"""``./claw test``: the test suite on real engines."""

from __future__ import annotations

import os
import sys

import typer

from tooling.stack.checkout import CHECKOUT

# All arguments belong to pytest.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def test(context: typer.Context) -> None:
    """Run the tests, which start and stop the engines that they need. All arguments go to pytest."""
    os.chdir(CHECKOUT)
    # Half of the tests' time is waiting for leases and retries. Three processes, each with engines of its own, finish
    # earliest on two cores.
    arguments = context.args or ["-n", "3", "--no-loadscope-reorder"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
