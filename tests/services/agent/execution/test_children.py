"""Another agent answers at the moment at which the run that asked it begins to wait."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.agent.definitions.models import Colleague, NewAgent
from services.agent.models.contract import ModelAnswer, Prompt, ToolCall, ToolTurn, Usage
from services.agent.runs.family import child_id
from tests.services.agent.execution.session_driver import PERSON, Outside, World


class Asking(Outside):
    """A model that asks another agent and answers with its reply."""

    def answer(self, prompt: Prompt) -> ModelAnswer:
        last = prompt.turns[-1]
        calls = () if isinstance(last, ToolTurn) else (ToolCall("c", "ask", '{"message":"Where?"}'),)
        text = last.content if isinstance(last, ToolTurn) else ""
        return ModelAnswer(text, calls, Usage(input_tokens=1, output_tokens=1), "m", "stop")


class AskingWorld(World):
    def _definition(self) -> NewAgent:
        other = Colleague(agent_id=self.agent_id, name="ask", description="Knows places.")
        return NewAgent(name="Helper", model="scripted/answer", agents=(other,))


@pytest.fixture
def world(database: str) -> Iterator[AskingWorld]:
    found = AskingWorld(database)
    found.begin_again()
    found.outside = Asking()
    yield found
    found.end()


def test_an_answer_that_comes_before_the_run_waits_for_it_is_heard(world: AskingWorld) -> None:
    run_id = world.run(world.say("Where is Bern?", by_channel=False))
    worker = world.workers[0]
    world.run(worker.claim())
    while worker.gate.standing[0][0] != "end":
        world.run(worker.move(0))
    # The run has looked and found no answer. Now there is one, but it does not resume the run, which does not wait yet.
    world.rows(
        "INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, status, error, parent_run_id, parent_step) "
        "SELECT $2, tenant_id, 'other', agent_id, $3, 'failed', 'in Switzerland', id, 2 FROM run WHERE id = $1",
        run_id,
        child_id(run_id, 2),
        PERSON,
    )
    for _ in range(2):
        while worker.gate.standing:
            world.run(worker.move(0))
        world.pauses_are_over()
        world.run(worker.claim())
    assert world.rows("SELECT status FROM run WHERE id = $1", run_id) == [("completed",)]
