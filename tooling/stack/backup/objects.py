"""The objects of the object store as parts of a backup: a bucket is a part, and its objects follow one another.

An object is ``length 4 bytes | JSON of StoredObject | its bytes``.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import msgspec
import urllib3
from minio import Minio
from minio.error import S3Error

from infra.connections import HttpTarget
from infra.stores.objects import list_objects
from tooling.stack.engines.base import EngineError

_PIECE_BYTES = 1024 * 1024
# An upload has one part of this size in memory. The store takes 10,000 parts of an object.
_UPLOAD_BYTES = 8 * 1024 * 1024
# A key has at most 1 KB, and metadata 2 KB.
_MAX_HEAD_BYTES = 64 * 1024
_TIMEOUT = urllib3.Timeout(connect=10, read=120)


class StoredObject(msgspec.Struct, frozen=True):
    """An object without its bytes."""

    key: str
    size: int
    """Bytes."""
    content_type: str
    metadata: dict[str, str]
    """Without the prefix ``x-amz-meta-``."""


def client(endpoint: str, access_key: str, secret_key: str, region: str = "us-east-1") -> Minio:
    """A client of an object store. `endpoint`: its URL, as `HttpTarget` reads it."""
    target = HttpTarget.parse(endpoint)
    url = urllib3.util.parse_url(target.url)
    pool = urllib3.PoolManager(
        ssl_context=target.context(), timeout=_TIMEOUT, retries=urllib3.Retry(3, backoff_factor=0.5)
    )
    secure = url.scheme == "https"
    return Minio(url.netloc or "", access_key, secret_key, secure=secure, region=region, http_client=pool)


def export(store: Minio, bucket: str, count: Callable[[], None]) -> Iterator[bytes]:
    """The part of a bucket; empty if there is no such bucket. Calls `count` after each object.

    An object that is deleted before it is read is not in the part.
    """
    if not store.bucket_exists(bucket):
        return
    for entry in list_objects(store, bucket):
        name = str(entry.object_name)
        try:
            answer = store.get_object(bucket, name)
        except S3Error as error:
            if error.code == "NoSuchKey":
                continue
            raise
        try:
            size = int(answer.headers["content-length"])
            found = StoredObject(name, size, answer.headers.get("content-type", ""), _metadata(answer.headers))
            head = msgspec.json.encode(found)
            yield len(head).to_bytes(4, "big") + head
            for piece in answer.stream(_PIECE_BYTES):
                size -= len(piece)
                yield piece
        finally:
            answer.close()
            answer.release_conn()
        if size:
            raise EngineError(f"object {bucket}/{name}: the object store sent {size} bytes less than it announced")
        count()


def restore(store: Minio, bucket: str, pieces: Iterator[bytes]) -> int:
    """Stores the objects of a part. Makes the bucket if it is missing. Returns the number of objects."""
    count, source = 0, _Source(pieces)
    while head := source.read(4):
        if (length := int.from_bytes(head, "big")) > _MAX_HEAD_BYTES:
            raise EngineError("a part with objects has a head that is too long")
        found = msgspec.json.decode(source.exactly(length), type=StoredObject)
        if not count and not store.bucket_exists(bucket):
            store.make_bucket(bucket)
        body = source.limited(found.size)
        store.put_object(
            bucket,
            found.key,
            body,  # type: ignore[arg-type]  # typed as a class, and it only reads
            found.size,
            found.content_type,
            metadata=dict(found.metadata),
            part_size=_UPLOAD_BYTES,
            num_parallel_uploads=1,
        )
        count += 1
    return count


def _metadata(headers: urllib3.HTTPHeaderDict) -> dict[str, str]:
    prefix = "x-amz-meta-"
    return {name.lower().removeprefix(prefix): headers[name] for name in headers if name.lower().startswith(prefix)}


class _Source:
    """Pieces of bytes as something to read from."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        """`size` bytes, or fewer at the end."""
        while len(self._buffer) < size and (piece := next(self._pieces, None)) is not None:
            self._buffer += piece
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken

    def exactly(self, size: int) -> bytes:
        if len(taken := self.read(size)) < size:
            raise EngineError("a part with objects ends in the middle of an object")
        return taken

    def limited(self, size: int) -> _Limited:
        return _Limited(self, size)


class _Limited(io.RawIOBase):
    """The next `size` bytes of a source."""

    def __init__(self, source: _Source, size: int) -> None:
        self._source = source
        self._left = size

    def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        self._left -= wanted
        return self._source.exactly(wanted)
