"""Work that is done again and again."""

from __future__ import annotations

import asyncio

from infra.service.periodic import Periodic


class Turns(Periodic):
    pause = 0.0
    failure = "could not turn"

    def __init__(self) -> None:
        super().__init__()
        self.turns = 0

    async def tick(self) -> None:
        self.turns += 1
        if self.turns == 1:
            raise ValueError("the first turn")
        await self.stop()


async def test_the_next_turn_comes_after_a_failed_one() -> None:
    turns = Turns()
    await asyncio.wait_for(turns.run(), 60)
    assert turns.turns == 2


async def test_a_pause_ends_when_the_work_is_stopped() -> None:
    turns = Turns()
    turns.pause = 3_600.0
    running = asyncio.create_task(turns.run())
    while not turns.turns:
        await asyncio.sleep(0)
    await turns.stop()
    await asyncio.wait_for(running, 60)
    assert turns.turns == 1
