"""Stored fact → public message."""

from __future__ import annotations

from collections.abc import Iterable

from infra.postgres.event_store import Aggregate, Publication
from infra.postgres.upcasting import EventTypes
from protos.messages.sample import NoteTaken
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.sample.desk.domain import Notebook, NoteWritten, decide, evolve


def publish(notebook: str, event: NoteWritten) -> Iterable[Publication]:
    yield Publication(SAMPLE_EVENTS, notebook, NoteTaken(notebook=notebook, number=event.number, text=event.text))


NOTEBOOK = Aggregate(
    name="notebook",
    events=EventTypes(
        NoteWritten,
        upcasters={("NoteWritten", 1): lambda old: {"number": old["number"], "text": old["note"]}},
    ),
    initial=Notebook,
    evolve=evolve,
    decide=decide,
    publish=publish,
)
