"""The files of documents on their way into the object store: each is noted before it is stored.

A process may die, a request may be cancelled and a tenant may be erased between the two. The note outlives all three,
because it is of no tenant; when it is due, a file that no document has is deleted, and so are the parts of a file whose
upload did not end.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO
from uuid import UUID

import msgspec

from infra.errors import TooManyRequests
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.outgoing.shares import Shares
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from infra.stores import filetypes
from infra.stores.objects import Kind, Objects, Stored, safe_name

# Of the Office formats before 2007 only Outlook's is read. Encrypted files of today look like the others, so that the
# parser must tell the reason.
DOCUMENT = Kind(
    "document",
    100 * 1024 * 1024,
    frozenset(
        (
            filetypes.PDF,
            *filetypes.OFFICE,
            filetypes.OLD_OFFICE,
            filetypes.RTF,
            filetypes.EPUB,
            filetypes.OUTLOOK,
            *filetypes.TEXTS,
            filetypes.HTML,
        )
    ),
)
LARGE_AT_ONCE = 8
"""The files that a process has on its disk while it receives them, or reads them before it gives their URLs out. A
tenant has a share, which alone is a half."""
# Longer than a file is received and stored for, and its document is added.
CHECK_AFTER = timedelta(hours=1)


class Upload(msgspec.Struct, frozen=True):
    """A file may have been stored for a document, or for a version of one. Without the file's name, which may tell
    something of an erased tenant."""

    tenant_id: str
    user_id: str
    id: UUID


# One lane per file.
UPLOADS = Lane("uploads", Upload)


class Uploads:
    def __init__(self, database: Database, objects: Objects) -> None:
        self._database = database
        self._objects = objects
        self._places = Shares(LARGE_AT_ONCE)

    @contextmanager
    def receiving(self, tenant_id: str) -> Iterator[None]:
        """A place for a large file, until it is stored. Raises TooManyRequests if the tenant gets none now."""
        if not self._places.take_now(tenant_id):
            raise TooManyRequests(timedelta(seconds=5), "too many large files are received or read at this moment")
        try:
            yield
        finally:
            self._places.give(tenant_id)

    async def download_url(self, tenant_id: str, path: str) -> str:
        """As `Objects.download_url`, which reads the file. Waits for a place."""
        async with self._places.place(tenant_id):
            return await self._objects.download_url(path)

    async def store(
        self, content: AsyncIterable[bytes] | IO[bytes], *, name: str, tenant_id: str, user_id: str, id_: UUID
    ) -> Stored:
        """Stores the file of the document, or version, with this id. Raises as `Objects.upload` does."""
        async with self._database.begin() as tx:
            tx.enqueue(UPLOADS, lane=str(id_), item=Upload(tenant_id, user_id, id_), after=CHECK_AFTER)
        path = f"{_folder(user_id, id_)}{safe_name(name)}"
        if isinstance(content, AsyncIterable):
            return await self._objects.upload(DOCUMENT, content, name=name, user_id=user_id, path=lambda _: path)
        return await self._objects.upload_file(DOCUMENT, content, name=name, user_id=user_id, path=lambda _: path)


@UPLOADS.runner(concurrency=1)
async def check_upload(item: Upload, effects: Effects, tx: Tx, objects: Objects) -> None:
    paths = await objects.paths(_folder(item.user_id, item.id))
    async with effects.begin() as reading:
        rows = await reading.sql(
            "SELECT path FROM document WHERE tenant_id = $1 AND path = ANY($2::text[])", item.tenant_id, paths
        )
    for path in {*paths} - {path for (path,) in rows}:
        await objects.delete(path)
    await objects.delete_unfinished(_folder(item.user_id, item.id))


def _folder(user_id: str, id_: UUID) -> str:
    """The beginning of the paths of a document's file in the object store."""
    return f"{user_id}/documents/{id_}_"
