"""A sealed stream opens whole and as it was written, or with one error."""

from __future__ import annotations

import io
import os

import pytest

from infra.errors import InvalidMessage
from infra.security.sealed_stream import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, SealedWriter, read_sealed

KEY, OTHER = bytes(range(32)), bytes(32)
SEALED_CHUNK = CHUNK_BYTES + TAG_BYTES
CONTENT = os.urandom(3 * CHUNK_BYTES + 1000)


def sealed(content: bytes, piece: int = 300_000) -> bytes:
    file = io.BytesIO()
    writer = SealedWriter(file, KEY)
    for start in range(0, len(content), piece):
        writer.write(content[start : start + piece])
    writer.close()
    return file.getvalue()


def opened(stream: bytes, key: bytes = KEY) -> bytes:
    return b"".join(read_sealed(io.BytesIO(stream), key))


def refused(stream: bytes, key: bytes = KEY) -> str:
    with pytest.raises(InvalidMessage) as refusal:
        opened(stream, key)
    return refusal.value.reason


@pytest.fixture(scope="module")
def stream() -> bytes:
    return sealed(CONTENT)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_content_of_any_length_is_read_as_it_was_written(size: int) -> None:
    content = CONTENT[:size]
    assert opened(sealed(content)) == content
    assert opened(sealed(content, piece=5_000_000)) == content


def test_a_source_that_gives_a_few_bytes_at_a_time_is_read_too(stream: bytes) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 70_000))

    assert b"".join(read_sealed(Slow(stream), KEY)) == CONTENT


def test_no_chunk_of_two_streams_is_equal(stream: bytes) -> None:
    assert sealed(CONTENT)[HEADER_BYTES : HEADER_BYTES + 1000] != stream[HEADER_BYTES : HEADER_BYTES + 1000]


@pytest.mark.parametrize("place", range(HEADER_BYTES))
def test_a_changed_byte_of_the_header_is_refused(stream: bytes, place: int) -> None:
    refused(flipped(stream, place))


@pytest.mark.parametrize("chunk", range(4))
@pytest.mark.parametrize("inside", [0, 500, -1])
def test_a_changed_byte_of_any_chunk_is_refused(stream: bytes, chunk: int, inside: int) -> None:
    start = HEADER_BYTES + chunk * SEALED_CHUNK
    end = min(start + SEALED_CHUNK, len(stream))
    assert "changed or cut off" in refused(flipped(stream, (start if inside >= 0 else end) + inside))


@pytest.mark.parametrize("chunks", range(4))
@pytest.mark.parametrize("more", [0, 1, TAG_BYTES - 1, TAG_BYTES, 700])
def test_a_stream_that_was_cut_off_is_refused_also_at_the_border_of_a_chunk(
    stream: bytes, chunks: int, more: int
) -> None:
    refused(stream[: HEADER_BYTES + chunks * SEALED_CHUNK + more])


@pytest.mark.parametrize("length", [0, 1, 8, 9, 17, HEADER_BYTES - 1])
def test_a_part_of_a_header_is_refused(stream: bytes, length: int) -> None:
    refused(stream[:length])


def test_chunks_in_another_order_or_left_out_or_added_are_refused(stream: bytes) -> None:
    header, chunks = stream[:HEADER_BYTES], []
    for start in range(HEADER_BYTES, len(stream), SEALED_CHUNK):
        chunks.append(stream[start : start + SEALED_CHUNK])
    for order in ((1, 0, 2, 3), (0, 2, 3), (0, 0, 1, 2, 3), (0, 1, 2, 2, 3), (0, 1, 2, 3, 3)):
        refused(header + b"".join(chunks[n] for n in order))
    refused(stream + b"x")
    other = sealed(CONTENT)
    refused(header + other[HEADER_BYTES : HEADER_BYTES + SEALED_CHUNK] + b"".join(chunks[1:]))


def test_another_key_is_named(stream: bytes) -> None:
    assert "sealed under the key" in refused(stream, OTHER)


def test_a_newer_version_is_named(stream: bytes) -> None:
    assert refused(stream[:8] + b"\x02" + stream[9:]) == "has version 2 of the encryption, and this code reads 1"


def test_any_other_file_is_refused() -> None:
    assert refused(b"PGDMP" + bytes(100)) == "is not a sealed stream"


def flipped(stream: bytes, place: int) -> bytes:
    changed = bytearray(stream)
    changed[place] ^= 1
    return bytes(changed)
