"""Fan-out: the real gateway with sockets that count. A socket with too few or too many deltas gives an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tooling.bench import fanout
from tooling.bench.consume import TOPICS
from tooling.bench.fanout import Fanout, running
from tooling.bench.fanout_processes import Socket, Watch, frame
from tooling.bench.fixture import bench_fixture
from tooling.bench.protocol import run_pairs
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Fanout]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fanout, "SOCKETS", 40)
        patch.setattr(fanout, "RUNS", 20)
        async with bench_fixture(stack, TOPICS) as place, running(place) as found:
            yield found


async def test_the_gateway_is_paired_with_bare_writes(bench: Fanout) -> None:
    [result] = await run_pairs("fanout", bench.ours, bench.anchors(), lambda *_: None, pairs=1)
    assert (result.anchor, result.goal) == ("bare writes to 40 sockets", 0.75)
    assert result.our_rate > 0
    assert result.ratio == pytest.approx(result.our_rate / result.anchor_rate)
    memory = bench.memory()
    assert (memory.unit, memory.goal, memory.made_of["sockets"]) == ("KiB", 12, 40)


@pytest.mark.parametrize("other", [-1, 1])
async def test_a_socket_with_too_few_or_too_many_deltas_is_an_error(bench: Fanout, other: int) -> None:
    bench.watching.sent[3] += other
    with pytest.raises(ValueError, match="least, most"):
        await bench.ours()
    bench.watching.sent[3] -= other
    assert (await bench.ours()).done > 0


class _Sent(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.data: list[bytes] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data.append(bytes(data))


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_frames_are_counted_however_they_are_cut(size: int) -> None:
    watch = Watch(200, 1_000, ["run"])
    socket, transport = Socket(watch, 0, ws=False), _Sent()
    socket.connection_made(transport)
    ping = b"\x89\x02hi"
    data = frame(b"{}") + frame(b"x" * 200) + ping + frame(b"x" * 200) + frame(b"x" * 199)
    for at in range(0, len(data), size):
        socket.data_received(data[at : at + size])
    assert socket.ready.done()
    assert (watch.total, watch.had) == (2, [[2]])
    assert transport.data == [b"0\n", b"\x8a\x82\0\0\0\0hi"]
