"""Ports of stacks that start at the same time."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tooling.stack.checkout import CHECKOUT
from tooling.testing.stack import free_ports

_OTHER = "import sys; from tooling.testing.stack import free_ports; print(*free_ports('ab').values()); sys.stdin.read()"


def test_a_port_of_another_process_is_not_given_again_until_that_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", _OTHER]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert other.stdin
    assert other.stdout
    first, second = map(int, other.stdout.readline().split())
    mine = free_ports("ab")["a"]
    pick = random.randrange
    picks = iter([second, mine + 1])
    monkeypatch.setattr(random, "randrange", lambda *limits: next(picks, None) or pick(*limits))
    assert not {first, second, mine, mine + 1} & set(free_ports("ab").values())
    assert next(picks, None) is None, "both were tried"
    other.communicate()
    picks = iter([first])
    assert free_ports("a") == {"a": first}
