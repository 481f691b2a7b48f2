"""``./claw test``: the test suite on real engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from tooling.stack.checkout import CHECKOUT

# All arguments belong to pytest.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
# Half of the tests' time is waiting for leases and retries. Three processes, each with engines of its own, finish
# earliest on two cores.
SUITE = ("-n", "3", "--no-loadscope-reorder")
# More failures than this are a fault of the code, and no second run would change that.
MOST_REPEATED = 5
_TESTS_FAILED = 1


def test(context: typer.Context) -> None:
    """Run the tests, which start and stop the engines that they need. All arguments go to pytest. Without arguments,
    a few tests that failed beside others run a second time, alone."""
    if context.args:
        os.chdir(CHECKOUT)
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *context.args])
    # Ctrl-C reaches pytest too, which stops its engines and returns. Without the handler pytest would be killed first.
    signal.signal(signal.SIGINT, lambda *_: None)
    # Ends pytest, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    raise typer.Exit(run_suite(CHECKOUT))


def run_suite(directory: Path) -> int:
    """Runs all tests of the directory and returns the exit code. A test that fails in both runs is a failure; one that
    passes alone is named at the end, because it is unsteady and has to be corrected."""
    # A cache of its own: names of an earlier run would be repeated in place of the failed tests.
    with TemporaryDirectory() as cache:
        code = _pytest(directory, *SUITE, "-o", f"cache_dir={cache}")
        if code != _TESTS_FAILED:
            return code
        failed = sorted(json.loads((Path(cache) / "v" / "cache" / "lastfailed").read_text()))
    # pytest without names would run all tests.
    if not 0 < len(failed) <= MOST_REPEATED:
        return code
    typer.echo(f"\n{len(failed)} of the tests failed. They run again now, with nothing beside them.")
    code = _pytest(directory, *failed)
    if not code:
        typer.echo("\nUnsteady tests: each failed beside others and passed alone. See the first failure above.")
        for node in failed:
            typer.echo(f"  {node}")
    return code


def _pytest(directory: Path, *arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=directory, check=False).returncode
