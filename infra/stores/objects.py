"""Files in the object store (S3): upload with checks of size and type, download, signed URLs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
import tempfile
import unicodedata
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus
from typing import IO, TypeVar
from urllib.parse import quote, urlsplit

import urllib3
from minio import Minio
from minio.datatypes import ListMultipartUploadsResult, Object
from minio.error import S3Error, ServerError

from infra.connections import HttpTarget
from infra.errors import InvalidMessage, NotFound, TooLarge, Transient, WrongType
from infra.stores import filetypes as types

T = TypeVar("T")

BUCKET = "openclaw-media"
DOWNLOAD_LIFE = timedelta(hours=1)
"""How long a signed URL works."""
MAX_NAME_BYTES = 100
"""Some stores add much to it, in file systems with 255 bytes."""

_MIB = 1024 * 1024
# Of the name that a stranger gives a file, the end counts, which has the extension.
_MAX_SENT_NAME = 1_000
# A larger file is kept on the disk while it is checked.
MEMORY_BYTES = _MIB
# A file up to this size is sent in one request: a killed process leaves no parts of it. The client has it in memory.
_ONE_REQUEST_BYTES = 20 * _MIB
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|#%{}^~\[\]`]+')


@dataclass(frozen=True)
class Kind:
    """A kind of file that may be stored, with its limits."""

    name: str
    """A singular noun for error texts."""
    max_bytes: int
    types: frozenset[str]
    """MIME types; one that ends in ``/`` allows all of its subtypes."""

    def takes(self, type_: str) -> bool:
        return type_ in self.types or f"{type_.partition('/')[0]}/" in self.types


@dataclass(frozen=True)
class Stored:
    """An object in the store."""

    path: str
    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""
    content_type: str
    """Detected from the content."""


def safe_name(name: str) -> str:
    """`name` as the last part of a path and of a URL: no folders, no control characters, at most 100 bytes.

    The extension is kept. ``file`` if no character is left.
    """
    # The time to normalise many accents on one letter grows with their square.
    text = unicodedata.normalize("NFC", name[-_MAX_SENT_NAME:]).encode(errors="ignore").decode()
    # Invisible characters, among them marks that change the direction of writing.
    text = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cf", "Co", "Cn"))
    text = _NOT_IN_NAMES.sub("_", re.split(r"[/\\]", text)[-1]).strip(" .") or "file"
    stem, dot, extension = text.rpartition(".")
    if not dot or len(extension) > 16:
        stem, extension = text, ""
    kept = stem.encode()[: MAX_NAME_BYTES - len((dot + extension).encode())].decode(errors="ignore")
    return f"{kept}.{extension}" if extension else kept


async def once(content: bytes) -> AsyncIterator[bytes]:
    """The chunks of a file that is in memory, for `Objects.upload`."""
    yield content


def _measured(file: IO[bytes]) -> tuple[int, str]:
    """The size and the SHA-256 of a file."""
    file.seek(0)
    size, digest = 0, hashlib.sha256()
    while chunk := file.read(_MIB):
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def _too_large(kind: Kind) -> TooLarge:
    return TooLarge(f"file: more than the {kind.max_bytes // _MIB} MB that {kind.name}s may have")


def _listed(mime_types: frozenset[str]) -> str:
    return ", ".join(sorted(f"{type_}*" if type_.endswith("/") else type_ for type_ in mime_types))


def list_objects(store: Minio, bucket: str, prefix: str = "") -> Iterator[Object]:
    """The objects whose names begin with `prefix`, in the order of names.

    By version 1 of the request: of version 2, S3Proxy refuses each page after the first 1,000 objects.
    """
    found: Iterator[Object] = store.list_objects(bucket, prefix, recursive=True, use_api_v1=True)
    return found


def abort_uploads(store: Minio, bucket: str, prefix: str, before: datetime | None = None) -> None:
    """Aborts uploads in parts to names that begin with `prefix`. A killed process leaves one, and its parts would stay.

    before: only those that began before this time. For S3Proxy, which knows no such times, all have begun just now.
    MinIO lists only uploads to exactly this name, and ends each by itself after a day.
    """
    # Not by the client's own method: S3Proxy refuses its parameters.
    answer = store._execute("GET", bucket, query_params={"uploads": "", "prefix": prefix})
    for upload in ListMultipartUploadsResult(answer).uploads:
        if before is None or (upload.initiated_time and upload.initiated_time < before):
            store._abort_multipart_upload(bucket, upload.object_name, upload.upload_id or "")


class Objects:
    """A bucket of the object store. Connects at first use, and makes the bucket if it is missing."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, bucket: str = BUCKET) -> None:
        """`endpoint`: its URL, as `HttpTarget` reads it."""
        target = HttpTarget.parse(endpoint)
        url = urlsplit(target.url)
        pool = urllib3.PoolManager(
            ssl_context=target.context(),
            timeout=urllib3.Timeout(connect=5, read=60),
            retries=urllib3.Retry(2, backoff_factor=0.2),
            maxsize=16,
        )
        # With a region given, the client does not ask for it before each signature.
        self._client = Minio(
            url.netloc, access_key, secret_key, secure=url.scheme == "https", region="us-east-1", http_client=pool
        )
        self._bucket = bucket
        self._has_bucket = False

    async def upload(
        self, kind: Kind, chunks: AsyncIterable[bytes], *, name: str, user_id: str, path: Callable[[str], str]
    ) -> Stored:
        """Checks a file while it is received, and stores it at the path that `path` returns for its SHA-256.

        name: the sender's name for the file. user_id: its owner.
        Raises InvalidMessage (field ``file``) if the file is empty or damaged, TooLarge as soon as it exceeds the
        limit, WrongType if `kind` does not take the type of its content, Transient if the store does not answer.
        """
        size = 0
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > kind.max_bytes:
                    raise _too_large(kind)
                await asyncio.to_thread(file.write, chunk)
            return await self.upload_file(kind, file, name=name, user_id=user_id, path=path)

    async def upload_file(
        self, kind: Kind, file: IO[bytes], *, name: str, user_id: str, path: Callable[[str], str]
    ) -> Stored:
        """As `upload`, for a file that was received already. No other copy of it is made."""
        size, sha256 = await asyncio.to_thread(_measured, file)
        if size > kind.max_bytes:
            raise _too_large(kind)
        if size == 0:
            raise InvalidMessage("file", "is empty")
        type_ = await asyncio.to_thread(types.content_type, file, name)
        if not kind.takes(type_):
            raise WrongType("file", f"has the type {type_}; a {kind.name} must have one of {_listed(kind.types)}")
        stored = Stored(path(sha256), size, sha256, type_)
        await self._call(lambda: self._put(file, stored, user_id))
        return stored

    @asynccontextmanager
    async def fetch(self, path: str) -> AsyncIterator[IO[bytes]]:
        """The object as a file, positioned at its beginning, for the length of the block.

        Raises NotFound, Transient if the store does not answer, RuntimeError if the content does not fit its checksum.
        """
        with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as file:
            await self._call(lambda: self._get(path, file))
            yield file

    async def download_url(self, path: str) -> str:
        """A URL with which anyone can download the object for an hour. A browser saves it and never shows it.

        Reads the object first, because the store does not notice damage. Raises as `fetch` does.
        """
        async with self.fetch(path):
            pass
        name = path.rpartition("/")[2]
        headers: dict[str, str | list[str] | tuple[str]] = {
            "response-content-disposition": f"attachment; filename*=UTF-8''{quote(name)}"
        }
        return await self._call(
            lambda: self._client.presigned_get_object(self._bucket, path, DOWNLOAD_LIFE, response_headers=headers)
        )

    async def delete(self, path: str) -> None:
        """Deletes the object; without error if it does not exist."""
        await self._call(lambda: self._client.remove_object(self._bucket, path))

    async def delete_unfinished(self, prefix: str) -> None:
        """Deletes the parts of uploads to paths that begin with `prefix`; none may be under way. They stay if the
        platform's account of the store has no right to list them."""

        def abort() -> None:
            try:
                abort_uploads(self._client, self._bucket, prefix)
            except S3Error as error:
                # Otherwise the check of each upload would end as a dead letter.
                if error.response.status != HTTPStatus.FORBIDDEN:
                    raise

        with suppress(NotFound):
            await self._call(abort)

    async def put_once(self, path: str, content: bytes) -> None:
        """Stores a short text, unless there is an object with this path. The content must follow from the path: of two
        callers at the same time, both may write."""
        await self._call(lambda: self._put_once(path, content))

    async def paths(self, prefix: str) -> list[str]:
        """The paths that begin with `prefix`, in their order; none if there is no bucket.

        Raises Transient if the store does not answer, or refuses the request.
        """

        def names() -> list[str]:
            try:
                return [str(entry.object_name) for entry in list_objects(self._client, self._bucket, prefix)]
            except S3Error as error:
                if error.code == "NoSuchBucket":
                    return []
                raise Transient(f"object store: {error.code}") from error

        return await self._call(names)

    def _put(self, file: IO[bytes], stored: Stored, user_id: str) -> None:
        self._need_bucket()
        file.seek(0)
        self._client.put_object(
            self._bucket,
            stored.path,
            file,  # type: ignore[arg-type]  # typed as a class, and it only reads
            stored.size,
            stored.content_type,
            metadata={"user-id": user_id, "checksum": stored.sha256},
            part_size=_ONE_REQUEST_BYTES if stored.size <= _ONE_REQUEST_BYTES else 0,
        )

    def _put_once(self, path: str, content: bytes) -> None:
        self._need_bucket()
        try:
            self._client.stat_object(self._bucket, path)
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            self._client.put_object(self._bucket, path, io.BytesIO(content), len(content), "text/plain")

    def _need_bucket(self) -> None:
        if self._has_bucket:
            return
        try:
            if not self._client.bucket_exists(self._bucket):
                self._client.make_bucket(self._bucket)
        except S3Error as error:
            # Another process was first.
            if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        self._has_bucket = True

    def _get(self, path: str, file: IO[bytes]) -> None:
        digest = hashlib.sha256()
        response = self._client.get_object(self._bucket, path)
        try:
            for chunk in response.stream(_MIB):
                digest.update(chunk)
                file.write(chunk)
        finally:
            response.close()
            response.release_conn()
        if digest.hexdigest() != response.headers.get("x-amz-meta-checksum"):
            raise RuntimeError(f"object {path}: the content does not fit its checksum")
        file.seek(0)

    async def _call(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.to_thread(call)
        except S3Error as error:
            if error.code in ("NoSuchKey", "NoSuchBucket"):
                raise NotFound(f"object: {error.object_name}") from error
            if error.response.status >= 500:
                raise Transient(f"object store: {error.code}") from error
            raise
        except (urllib3.exceptions.HTTPError, ServerError, OSError) as error:
            raise Transient(f"object store: {type(error).__name__}") from error
