"""Every message that the ledger receives."""

from __future__ import annotations

from collections import Counter

from infra.postgres.tx import Tx
from protos.messages.sample import NoteTaken
from protos.sample.v1 import sample_pb2, sample_pb2_grpc
from tooling.testing.sample.catalog import SAMPLE_EVENTS


@SAMPLE_EVENTS.batch(group="sample_ledger", projection=("total", "effect"))
async def count_notes(notes: list[NoteTaken], tx: Tx, front: sample_pb2_grpc.SampleStub) -> None:
    books = sorted({note.notebook for note in notes})
    seen = Counter(
        dict(
            tuple(row)
            for row in await tx.sql("SELECT notebook, notes FROM total WHERE notebook = ANY($1::text[])", books)
        )
    )
    nth = []
    for note in notes:
        seen[note.notebook] += 1
        nth.append(seen[note.notebook])
    await tx.sql(
        "INSERT INTO effect SELECT * FROM unnest($1::text[], $2::bigint[], $3::bigint[])",
        [note.notebook for note in notes],
        [note.number for note in notes],
        nth,
    )
    await tx.sql(
        """
        INSERT INTO total AS t SELECT notebook, count(*), sum(letters) FROM unnest($1::text[], $2::bigint[])
        AS n(notebook, letters) GROUP BY notebook ORDER BY notebook ON CONFLICT (notebook)
        DO UPDATE SET notes = t.notes + excluded.notes, letters = t.letters + excluded.letters
        """,
        [note.notebook for note in notes],
        [len(note.text) for note in notes],
    )
    last = notes[-1]

    async def tell_front() -> None:
        with tx.follow(last, "tell front"):
            await front.Seen(sample_pb2.SeenRequest(key=last.notebook, count=seen[last.notebook]))

    tx.after_commit(tell_front)
