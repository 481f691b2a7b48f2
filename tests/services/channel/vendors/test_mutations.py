"""Genuine calls with any other content, and forged calls: an adapter raises only the errors that are answers.

CLAW_MUTATIONS sets the number of calls for each vendor: ``CLAW_MUTATIONS=100000 ./claw test`` with this file.
"""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest

from infra.clock import utcnow
from infra.errors import InvalidMessage, Unauthenticated
from services.channel.vendors import VENDORS
from services.channel.vendors.base import UnreadableCall
from services.channel.vendors.items import Change, Ignored, Inbound, Moved, Receipt
from tests.services.channel.vendors.mutated import MADE, changed, halved

COUNT = int(os.environ.get("CLAW_MUTATIONS", "300"))
pytestmark = pytest.mark.timeout(180 + COUNT // 50)
# By how much the memory of this process may grow in all calls after the first tenth.
MOST_GROWTH_BYTES = 32 * 1024 * 1024


class Memory:
    """The growth of this process's resident memory."""

    def __init__(self) -> None:
        self._begin = 0

    def made(self, n: int) -> None:
        """After call `n` of COUNT, from 0."""
        if n == COUNT // 10:
            self._begin = _resident_bytes()
        elif n == COUNT - 1:
            assert _resident_bytes() - self._begin < MOST_GROWTH_BYTES


def _resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_every_vendor_is_here() -> None:
    assert set(MADE) == set(VENDORS)


@pytest.mark.parametrize("name", sorted(VENDORS))
def test_a_genuine_call_with_any_content_is_read_or_refused(name: str) -> None:
    given, contents, make = MADE[name]
    vendor, credentials = VENDORS[name], VENDORS[name].credentials(**given)
    chance = random.Random(name)
    read = 0
    memory = Memory()
    for n in range(COUNT):
        memory.made(n)
        given_content = chance.choice(contents)
        for _ in range(chance.randrange(4)):
            given_content = changed(given_content, chance)
        try:
            received = vendor.receive(make(given_content), credentials, utcnow())
        except (InvalidMessage, UnreadableCall, Unauthenticated, RecursionError):
            continue
        read += 1
        for item in received.items:
            assert isinstance(item, Inbound | Change | Ignored | Moved | Receipt)
            assert item.ids
            assert all(isinstance(id_, str) for id_ in item.ids)
            if isinstance(item, Inbound):
                texts = (item.conversation, item.person, item.message, item.text)
                assert all(isinstance(text, str) for text in texts)
    assert read


@pytest.mark.parametrize("name", sorted(set(VENDORS) - {"twilio", "wecom"}))
def test_half_a_character_in_any_field_loses_no_message(name: str) -> None:
    """A call that is refused for it would come again for days."""
    given, contents, make = MADE[name]
    vendor, credentials = VENDORS[name], VENDORS[name].credentials(**given)
    for content in contents:
        whole = vendor.receive(make(content), credentials, utcnow()).items
        for found in (halved(content), content | {"new": "\ud83d"}):
            items = vendor.receive(make(found), credentials, utcnow()).items
            assert [type(item) for item in items] == [type(item) for item in whole]


@pytest.mark.parametrize("name", sorted(VENDORS))
def test_a_call_with_any_change_of_its_bytes_or_proof_is_refused(name: str) -> None:
    given, contents, make = MADE[name]
    vendor, credentials = VENDORS[name], VENDORS[name].credentials(**given)
    chance = random.Random(name)
    genuine = make(contents[0])
    vendor.receive(genuine, credentials, utcnow())
    # These proofs do not cover the body.
    is_covered = name not in ("telegram", "dingtalk", "teams")
    memory = Memory()
    for n in range(COUNT):
        memory.made(n)
        body, headers, query = genuine.body, dict(genuine.headers), genuine.query
        if is_covered and chance.random() < 0.5:
            at = chance.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ (1 << chance.randrange(8))]) + body[at + 1 :]
        else:
            proofs = [one for one in headers if one not in ("content-type",)]
            if not proofs:
                query = query[: chance.randrange(len(query))]
            else:
                proof = chance.choice(proofs)
                value = headers[proof]
                at = chance.randrange(len(value))
                headers[proof] = value[:at] + chance.choice("0aZ-\xfc") + value[at + 1 :]
                if headers[proof] == value:
                    continue
        forged = genuine._replace(body=body, headers=headers, query=query)
        try:
            # UnreadableCall would be answered with 200, as genuine.
            received = vendor.receive(forged, credentials, utcnow())
        except (InvalidMessage, Unauthenticated):
            continue
        # Some encodings write the same proof or the same XML in more than one way.
        assert received == vendor.receive(genuine, credentials, utcnow())
