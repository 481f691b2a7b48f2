"""The anchors of the runs bench, each a process of its own: ``python -I runs_anchors.py langgraph|dbos <database>``.

They run in an environment with ``requirements-bench.txt`` and without our code. After ``ready``, each line on stdin is
a number of seconds to run, and each line on stdout is the number of runs that ended in that time.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterable
from itertools import pairwise
from time import perf_counter
from typing import TypedDict
from uuid import uuid4

STEPS = 5
# Parallel runs. More were not faster.
TASKS = 8
THREADS = 20


def said(text: str) -> str:
    """The work of a step: almost none, as in our own runs."""
    return text + "."


def slices() -> Iterable[float]:
    print("ready", flush=True)  # noqa: T201
    return map(float, sys.stdin)


class State(TypedDict):
    text: str


async def langgraph(url: str) -> None:
    """A graph of five nodes in a row; each checkpoint is committed before the next node begins.

    Saver and pool are as in LangGraph's documents. A saver takes one checkpoint at a time, even if its pool is large.
    With a saver per task, which no document advises, it makes about 1.6 times as many runs.
    """
    from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
    from langgraph.graph import END, START, StateGraph
    from psycopg.rows import dict_row
    from psycopg_pool import AsyncConnectionPool

    async def node(state: State) -> State:
        return {"text": said(state["text"])}

    names = [START, *(f"step {n}" for n in range(STEPS)), END]
    builder = StateGraph(State)
    for name in names[1:-1]:
        builder.add_node(name, node)
    for before, after in pairwise(names):
        builder.add_edge(before, after)
    options = {"autocommit": True, "prepare_threshold": 0, "row_factory": dict_row}
    async with AsyncConnectionPool(url, min_size=TASKS, max_size=TASKS, kwargs=options) as pool:
        saver = AsyncPostgresSaver(pool)
        await saver.setup()
        graph = builder.compile(checkpointer=saver)

        async def runs(until: float) -> int:
            done = 0
            while perf_counter() < until:
                config = {"configurable": {"thread_id": str(uuid4())}}
                await graph.ainvoke({"text": ""}, config, durability="sync")
                done += 1
            return done

        for seconds in slices():
            until = perf_counter() + seconds
            print(sum(await asyncio.gather(*(runs(until) for _ in range(TASKS)))), flush=True)  # noqa: T201


def dbos(url: str) -> None:
    """A workflow of five steps in threads with a connection each. Coroutines make fewer runs."""
    from dbos import DBOS

    DBOS(config={"name": "bench", "system_database_url": url, "sys_db_pool_size": THREADS, "log_level": "WARNING"})
    step = DBOS.step()(said)

    def steps() -> str:
        text = ""
        for _ in range(STEPS):
            text = step(text)
        return text

    workflow = DBOS.workflow()(steps)
    DBOS.launch()
    for seconds in slices():
        until = perf_counter() + seconds
        done = [0] * THREADS

        def runs(number: int, until: float, done: list[int]) -> None:
            while perf_counter() < until:
                workflow()
                done[number] += 1

        working = [threading.Thread(target=runs, args=(number, until, done)) for number in range(THREADS)]
        for thread in working:
            thread.start()
        for thread in working:
            thread.join()
        print(sum(done), flush=True)  # noqa: T201
    DBOS.destroy()


if __name__ == "__main__":
    _, which, database = sys.argv
    if which == "langgraph":
        asyncio.run(langgraph(database))
    else:
        dbos(database)
