"""Programs under the supervisor of a state folder."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from tooling.stack.engines.base import Program
from tooling.stack.supervisor import Supervisor
from tooling.testing.stack import private_home


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with private_home() as home:
        supervisor = Supervisor(home)
        supervisor.start()
        yield supervisor
        # Of this user, and not of the stack's: ./claw down could not end it.
        supervisor.shutdown(kill=True)


def test_a_stopped_program_starts_as_before_and_restarts_with_what_is_given(supervisor: Supervisor) -> None:
    """Campaigns lead a program through proxies by its script, and a proper stop and start must not undo that."""

    def variable() -> str:
        # It is running after a second. Before that, its process may still be the shell that starts it.
        while supervisor.processes()["sleeper"].state != "RUNNING":
            pass
        return str(psutil.Process(supervisor.processes()["sleeper"].pid).environ()["WAY"])

    def asleep(way: str) -> Program:
        return Program(("sleep", "1000"), {"WAY": way})

    supervisor.add("sleeper", asleep("straight"))
    assert variable() == "straight"
    [script] = supervisor.log("sleeper").parents[1].glob("programs/sleeper.sh")
    script.write_text(script.read_text().replace("straight", "proxied"))
    supervisor.stop("sleeper")
    supervisor.add("sleeper", asleep("straight"))
    assert variable() == "proxied"
    supervisor.restart("sleeper", asleep("new"))
    assert variable() == "new"
