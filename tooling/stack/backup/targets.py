"""The places that keep backups: a folder, or a bucket of an object store (``s3://bucket/prefix``)."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Protocol, cast
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException, S3Error, ServerError

from infra.clock import utcnow
from infra.stores.objects import abort_uploads, list_objects
from tooling.stack.backup import objects
from tooling.stack.engines.base import EngineError

_NAME = re.compile(r"clawbus-(\d{8}T\d{6}Z)\.backup")
# An upload keeps one part in memory. 10,000 parts of an object make backups up to 320 GB possible.
_PART_BYTES = 32 * 1024 * 1024
_UNFINISHED = ".unfinished"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Less than a day, so that the next daily backup removes the parts that this one left.
_LEFT_SECONDS = 20 * 3600


def file_name(at: datetime) -> str:
    """The name of the backup of that moment."""
    return f"clawbus-{at.astimezone(UTC):%Y%m%dT%H%M%SZ}.backup"


def made_at(name: str) -> datetime | None:
    """The moment in a backup's name. None for any other name."""
    found = _NAME.fullmatch(name)
    return datetime.strptime(f"{found[1]}+0000", "%Y%m%dT%H%M%SZ%z") if found else None


class Target(Protocol):
    """A place that keeps files by their names: backups, or the WAL of a database."""

    def new(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """The file to write to. It appears if the block ends without an error. A folder overwrites no file."""

    def read(self, name: str) -> AbstractContextManager[IO[bytes] | None]:
        """The file to read from; None if the place has none of that name."""

    def stored(self) -> dict[str, datetime]:
        """Name → the time at which it was stored."""

    def remove(self, name: str) -> None: ...

    def where(self, name: str) -> str:
        """The path or URL of a file."""


class Folder:
    """A folder of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def new(self, name: str) -> Iterator[IO[bytes]]:
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Parts of processes that were killed. Before this file is written: they may fill the disk.
        for left in self._path.glob(f"*{_UNFINISHED}"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > _LEFT_SECONDS:
                    left.unlink()
        # Of this process: another one that was killed may have left its file.
        unfinished = self._path / f"{name}.{os.getpid()}{_UNFINISHED}"
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # Unlike `rename`, it fails if there is a file of that name.
            os.link(unfinished, self._path / name)
        except FileExistsError:
            raise EngineError(f"{self.where(name)}: exists already and is not overwritten") from None
        finally:
            unfinished.unlink(missing_ok=True)
        # Without this a power loss could take the name away, after PostgreSQL was told that its WAL is archived.
        folder = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def read(self, name: str) -> Iterator[IO[bytes] | None]:
        try:
            file = (self._path / name).open("rb")
        except FileNotFoundError:
            yield None
            return
        with file:
            yield file

    def stored(self) -> dict[str, datetime]:
        if not self._path.is_dir():
            return {}
        files = {p.name: p.stat() for p in self._path.iterdir() if p.is_file() and not p.name.endswith(_UNFINISHED)}
        return {name: datetime.fromtimestamp(stat.st_mtime, UTC) for name, stat in files.items()}

    def remove(self, name: str) -> None:
        (self._path / name).unlink()

    def where(self, name: str) -> str:
        return str(self._path / name)


class Bucket:
    """A bucket of an object store, or a part of it."""

    def __init__(self, store: Minio, bucket: str, prefix: str) -> None:
        self._store = store
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

    @contextmanager
    def new(self, name: str) -> Iterator[IO[bytes]]:
        if not self._store.bucket_exists(self._bucket):
            self._store.make_bucket(self._bucket)
        upload = _Upload(self._store, self._bucket, self._prefix + name)
        try:
            yield cast(IO[bytes], upload)
        except BaseException:
            upload.abort()
            raise
        upload.complete()
        # Parts of processes that were killed. The account may have no right to list them, and the file is stored.
        with suppress(MinioException, urllib3.exceptions.HTTPError):
            abort_uploads(self._store, self._bucket, self._prefix, utcnow() - timedelta(seconds=_LEFT_SECONDS))

    @contextmanager
    def read(self, name: str) -> Iterator[IO[bytes] | None]:
        try:
            answer = self._store.get_object(self._bucket, self._prefix + name)
        except S3Error as error:
            if error.code not in ("NoSuchKey", "NoSuchBucket"):
                raise
            yield None
            return
        try:
            yield cast(IO[bytes], answer)
        finally:
            answer.close()
            answer.release_conn()

    def stored(self) -> dict[str, datetime]:
        if not self._store.bucket_exists(self._bucket):
            return {}
        names = {
            str(found.object_name).removeprefix(self._prefix): cast(datetime, found.last_modified)
            for found in list_objects(self._store, self._bucket, self._prefix)
        }
        return {name: at for name, at in names.items() if "/" not in name}

    def remove(self, name: str) -> None:
        self._store.remove_object(self._bucket, self._prefix + name)

    def where(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{name}"


class _Upload:
    """Writes to an object whose length is not known. A thread reads the other end of a pipe."""

    def __init__(self, store: Minio, bucket: str, key: str) -> None:
        reading, writing = os.pipe()
        self._writing = os.fdopen(writing, "wb", buffering=0)
        self._reading = os.fdopen(reading, "rb", buffering=0)
        self._aborted = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(store, bucket, key))
        self._thread.start()

    def write(self, content: bytes) -> None:
        try:
            view = memoryview(content)
            while view:
                view = view[self._writing.write(view) :]
        except BrokenPipeError:
            # The upload has failed and closed its end; `complete` raises its error.
            self.complete()

    def complete(self) -> None:
        self._writing.close()
        self._thread.join()
        if self._error:
            raise self._error

    def abort(self) -> None:
        # The end of the pipe alone would complete the object.
        self._aborted = True
        self._writing.close()
        self._thread.join()

    def read(self, size: int) -> bytes:
        """For the client, in the thread."""
        piece = self._reading.read(size) or b""
        if not piece and self._aborted:
            raise EngineError("the backup was not completed")
        return piece

    def _run(self, store: Minio, bucket: str, key: str) -> None:
        try:
            store.put_object(
                bucket,
                key,
                self,  # type: ignore[arg-type]  # typed as a class, and it only reads
                -1,
                part_size=_PART_BYTES,
                num_parallel_uploads=1,
            )
        except Exception as error:
            # For the thread that writes.
            self._error = error
        finally:
            self._reading.close()


def target(to: str, own: dict[str, str]) -> Target:
    """`to`: a folder or ``s3://bucket/prefix``. `own`: the access to the stack's own object store."""
    return target_with_access(to, store_access(own) if to.startswith("s3://") else {})


def target_with_access(to: str, access: dict[str, str]) -> Target:
    """As `target`, with the access to the object store that `to` is in, as `store_access` returns it."""
    if not to.startswith("s3://"):
        if "://" in to:
            raise EngineError(f"{to}: must be a folder or s3://bucket/prefix")
        return Folder(Path(to).absolute())
    bucket, prefix = _s3(to)
    return Bucket(objects.client(**access), bucket, prefix)


@contextmanager
def open_backup(where: str) -> Iterator[IO[bytes]]:
    """A backup to read: a file or ``s3://bucket/key``. Raises EngineError if it cannot be read."""
    if not where.startswith("s3://"):
        if not Path(where).is_file():
            raise EngineError(f"{where}: is not a file")
        with Path(where).open("rb") as file:
            yield file
        return
    bucket, key = _s3(where)
    if not key:
        raise EngineError(f"{where}: must name the backup in the bucket")
    with named_store_errors(where), Bucket(objects.client(**store_access({})), bucket, "").read(key) as answer:
        if answer is None:
            raise EngineError(f"{where}: does not exist")
        yield answer


@contextmanager
def named_store_errors(what: str) -> Iterator[None]:
    """Turns the errors of an object store into an EngineError that names `what`."""
    try:
        yield
    except S3Error as error:
        raise EngineError(f"{what}: the object store refused ({error.code}: {error.message})") from error
    except (urllib3.exceptions.HTTPError, ServerError) as error:
        raise EngineError(f"{what}: the object store does not answer ({type(error).__name__})") from error


def _s3(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    if not _BUCKET.fullmatch(parts.netloc):
        raise EngineError(f"{url}: must have the form s3://bucket/prefix, with the bucket in small letters and digits")
    return parts.netloc, parts.path.removeprefix("/")


def store_access(own: dict[str, str]) -> dict[str, str]:
    """The store that the usual variables of S3 clients name, or else the stack's own one."""
    if access_key := os.environ.get("AWS_ACCESS_KEY_ID"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint and not endpoint.startswith(("http://", "https://")):
            raise EngineError(f"AWS_ENDPOINT_URL: {endpoint!r} must be http://host:port or https://host:port")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        secret_key = os.environ.get("AWS_SECRET_ACCESS_KEY", "")
        return {
            "endpoint": endpoint or "https://s3.amazonaws.com",
            "access_key": access_key,
            "secret_key": secret_key,
            "region": region,
        }
    if own:
        return own
    raise EngineError(
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, unless it is Amazon's, AWS_ENDPOINT_URL must be set for s3://"
    )
