"""Histories of stored events, in every form that was ever written, run through today's upcasters and folds.

A file is ``<service>.<kind of stream>.<name>.json``: events as they were stored, and the rows of each read model that
follow from them. The events of a file never change, because events of these forms exist. A new form (a new event, a new
field, a new version) is added in a further history.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any

import msgspec
import pytest

from infra.postgres.event_store import Aggregate
from infra.postgres.read_models import FoldedEvents, Recorded
from infra.postgres.upcasting import schema_version
from infra.service.service import Service
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICES

FOLDER = CHECKOUT / "tests" / "contracts" / "events"
HISTORIES = sorted(path.stem for path in FOLDER.glob("*.json"))
BEGAN = datetime(2026, 3, 1, tzinfo=UTC)


def declared(name: str) -> Service:
    service = import_module(f"services.{name}.__main__").service
    assert isinstance(service, Service)
    return service


def kinds() -> dict[tuple[str, str], Aggregate[Any]]:
    return {(name, kind.name): kind for name in SERVICES for kind in declared(name).aggregates}


def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def events_of(name: str, history: Any) -> list[Any]:
    """The events in their current form."""
    service, kind, _ = name.split(".", 2)
    types = kinds()[service, kind].events
    stored = [(one["type"], one["schema_version"], json.dumps(one["data"]).encode()) for one in history["events"]]
    return [types.decode(*one) for one in stored]


def rows_of(name: str, history: Any) -> Any:
    """Name of each read model of the stream → its rows."""
    service, kind, _ = name.split(".", 2)
    events = [Recorded(event, "t", BEGAN + timedelta(seconds=n)) for n, event in enumerate(events_of(name, history), 1)]
    rows = {}
    for model in declared(service).read_models:
        match model.events:
            case FoldedEvents(aggregate, fold) if aggregate.name == kind:
                rows[model.name] = json.loads(msgspec.json.encode(list(fold(history["stream"], events))))
    return rows


@pytest.mark.parametrize("name", HISTORIES)
def test_todays_folds_make_the_same_rows_of_a_stored_history(name: str) -> None:
    history = read(name)
    assert rows_of(name, history) == history["rows"]


@pytest.mark.parametrize("name", HISTORIES)
def test_the_state_is_folded_from_a_stored_history(name: str) -> None:
    service, kind, _ = name.split(".", 2)
    aggregate = kinds()[service, kind]
    state = aggregate.initial()
    for event in events_of(name, read(name)):
        state = aggregate.evolve(state, event)


def test_every_form_of_every_event_is_in_a_history() -> None:
    """The forms of an event: each version, the newest one with all fields, and with none of those that have a default,
    which were added later."""
    missing, stored = set(), set()
    for name in HISTORIES:
        service, kind, _ = name.split(".", 2)
        for one in read(name)["events"]:
            stored.add((service, kind, one["type"], one["schema_version"], frozenset(one["data"])))
    for (service, kind), aggregate in kinds().items():
        for event in aggregate.events.current():
            place = (service, kind, event.__name__)
            fields = msgspec.structs.fields(event)
            every = frozenset(field.encode_name for field in fields)
            first = frozenset(field.encode_name for field in fields if field.required)
            missing |= {
                (*place, schema_version(event), form)
                for form in (every, first)
                if (*place, schema_version(event), form) not in stored
            }
            versions = {version for *known, version, _ in stored if tuple(known) == place}
            missing |= {(*place, version, frozenset()) for version in range(1, schema_version(event))} - {
                (*place, version, frozenset()) for version in versions
            }
    assert missing == set()
