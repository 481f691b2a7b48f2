"""``./claw test``: the test suite on real engines."""

from __future__ import annotations

import os
import sys

import typer

from tooling.stack.checkout import CHECKOUT

# Every word is pytest's.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def test(context: typer.Context) -> None:
    """Run the tests; every argument goes to pytest. The engines they need are started and stopped by themselves."""
    os.chdir(CHECKOUT)
    # All of them wait for leases and retries for half of the time: two processes, each with engines of its own, are
    # sooner done on the same two cores.
    arguments = context.args or ["-n", "2", "--no-loadscope-reorder"]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
