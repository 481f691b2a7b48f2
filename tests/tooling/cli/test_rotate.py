"""Keys are replaced by one command at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tooling.cli.rotate import alone
from tooling.stack.checkout import CHECKOUT

_OTHER = """
import sys
from pathlib import Path
from tooling.cli.rotate import alone
with alone(Path(sys.argv[1])):
    print("has it", flush=True)
"""


def test_a_rotation_waits_for_another_one_of_the_same_stack(tmp_path: Path) -> None:
    with alone(tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", _OTHER, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=CHECKOUT,
        )
        assert other.stdout
        assert other.stdout.readline() == "Waiting for another `./claw rotate` of this stack to end.\n"
    assert other.communicate()[0] == "has it\n"
