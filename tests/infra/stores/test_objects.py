"""Files in a real object store, checked with the store's own client."""

from __future__ import annotations

import asyncio
import hashlib
import io
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from unittest.mock import Mock
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
import urllib3
from minio import Minio
from minio.error import S3Error

from infra.errors import InvalidMessage, NotFound, TooLarge, Transient, WrongType
from infra.stores import filetypes
from infra.stores.objects import BUCKET, Kind, Objects, Stored, once, safe_name
from tooling.testing.stack import Stack, running_stack

PICTURE = Kind("picture", 5 * 1024 * 1024, frozenset(("image/jpeg", "image/png", "image/webp")))
MEDIA = Kind("medium", 1024 * 1024, frozenset(("image/", "audio/", "video/", filetypes.PDF, *filetypes.OFFICE)))
TEXTS = (*filetypes.TEXTS, filetypes.HTML)
DOCUMENT = Kind("document", 10 * 1024 * 1024, frozenset((filetypes.PDF, filetypes.EPUB, *filetypes.OFFICE, *TEXTS)))
PACKAGE = Kind("package", 1024 * 1024, frozenset((filetypes.ZIP,)))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, "x")
    return file.getvalue()


@pytest.fixture(scope="module")
def store() -> Iterator[Stack]:
    with running_stack(("s3",)) as stack:
        yield stack


@pytest.fixture(scope="module")
def objects(store: Stack) -> Objects:
    return Objects(**store.engines["s3"])


@pytest.fixture(scope="module")
def judge(store: Stack) -> Minio:
    s3 = store.engines["s3"]
    return Minio(urlsplit(s3["endpoint"]).netloc, s3["access_key"], s3["secret_key"], secure=False)


async def pieces(content: bytes, size: int = 1000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def upload(objects: Objects, kind: Kind, content: bytes, name: str = "a file") -> Stored:
    path = f"test/{uuid4().hex}"
    return await objects.upload(kind, pieces(content), name=name, user_id="u1", path=lambda _: path)


async def test_a_document_is_stored_with_its_type_owner_and_checksum(objects: Objects, judge: Minio) -> None:
    content = b"# Handbook\n" * 200_000
    digest = hashlib.sha256(content).hexdigest()
    path = f"u1/documents/{uuid4().hex}_{safe_name('产品 Handbook.md')}"
    stored = await objects.upload(DOCUMENT, pieces(content), name="a.md", user_id="u1", path=lambda sha256: path)
    assert stored == Stored(path, len(content), digest, "text/markdown")
    found = judge.stat_object(BUCKET, path)
    assert found.metadata is not None
    assert (found.size, found.content_type) == (len(content), "text/markdown")
    assert (found.metadata["x-amz-meta-user-id"], found.metadata["x-amz-meta-checksum"]) == ("u1", digest)
    async with objects.fetch(path) as file:
        assert file.read() == content
    await objects.delete(path)
    await objects.delete(path)
    with pytest.raises(NotFound):
        async with objects.fetch(path):
            pass


async def test_the_path_may_be_made_of_the_checksum(objects: Objects) -> None:
    stored = await objects.upload(
        PICTURE, pieces(PNG), name="me", user_id="u1", path=lambda sha256: f"u1/{sha256[:16]}.png"
    )
    assert stored.path == f"u1/{hashlib.sha256(PNG).hexdigest()[:16]}.png"
    await objects.delete(stored.path)


async def test_anyone_can_download_with_the_url_as_a_file_and_not_as_a_page(objects: Objects) -> None:
    path = f"u1/documents/{uuid4().hex}_{safe_name('页 &.html')}"
    await objects.upload(DOCUMENT, pieces(b"<html>x</html>"), name="x", user_id="u1", path=lambda _: path)
    url = await objects.download_url(path)
    assert "X-Amz-Expires=3600" in url
    answer = await asyncio.to_thread(urllib3.request, "GET", url)
    assert (answer.status, answer.data) == (200, b"<html>x</html>")
    assert answer.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
    unsigned = await asyncio.to_thread(urllib3.request, "GET", url.partition("?")[0])
    assert unsigned.status != 200
    await objects.delete(path)


async def test_a_file_that_was_received_is_stored_without_another_copy(
    objects: Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"test/{uuid4().hex}"
    with monkeypatch.context() as no_copy, io.BytesIO(b"text" * 1_000_000) as file:
        no_copy.delattr(tempfile, "SpooledTemporaryFile")
        stored = await objects.upload_file(DOCUMENT, file, name="a.txt", user_id="u", path=lambda _: path)
        assert (stored.size, stored.content_type) == (4_000_000, "text/plain")
        for content, error in ((b"", InvalidMessage), (bytes(10 * 1024 * 1024 + 1), TooLarge)):
            with pytest.raises(error):
                await objects.upload_file(DOCUMENT, io.BytesIO(content), name="a", user_id="u", path=lambda _: path)
    async with objects.fetch(path) as got:
        assert got.read() == b"text" * 1_000_000
    await objects.delete(path)


async def test_a_damaged_object_is_not_given_out(objects: Objects, store: Stack) -> None:
    stored = await upload(objects, DOCUMENT, b"as it was")
    file = store.home / "s3" / "data" / BUCKET / stored.path
    for damage in (b"as it is!", b"as it"):
        with file.open("r+b") as opened:
            opened.truncate(len(damage))
            opened.write(damage)
        with pytest.raises((RuntimeError, Transient), match=r"checksum|IncompleteRead"):
            async with objects.fetch(stored.path):
                pass
        with pytest.raises((RuntimeError, Transient), match=r"checksum|IncompleteRead"):
            await objects.download_url(stored.path)
    await objects.delete(stored.path)


async def test_a_file_that_is_too_large_is_refused_while_it_is_received(objects: Objects) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield bytes(1024 * 1024)

    with pytest.raises(TooLarge, match="5 MB"):
        await objects.upload(PICTURE, endless(), name="x", user_id="u1", path=lambda _: "never")
    assert taken == 6


async def test_an_empty_file_is_refused(objects: Objects) -> None:
    with pytest.raises(InvalidMessage, match="empty"):
        await upload(objects, DOCUMENT, b"")


async def test_a_damaged_archive_is_refused(objects: Objects) -> None:
    with pytest.raises(InvalidMessage, match="damaged"):
        await upload(objects, DOCUMENT, archive("word/document.xml")[:-10])


@pytest.mark.parametrize(
    ("kind", "content", "name"),
    [
        (PICTURE, b"<html></html>", "me.png"),
        (PICTURE, b"GIF89a" + bytes(20), "me.gif"),
        (DOCUMENT, archive("a.txt"), "a.docx"),
        (DOCUMENT, PNG, "a.pdf"),
        (DOCUMENT, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(20), "a.docx"),
        (DOCUMENT, b"\x7fELF" + bytes(20), "a.txt"),
        (MEDIA, archive("a.txt"), "a.zip"),
        (MEDIA, b"MZ\x90\x00" + bytes(20), "a.jpg"),
        (PACKAGE, b"%PDF-1.7", "package.zip"),
    ],
)
async def test_the_type_comes_from_the_content_and_not_from_the_name(
    objects: Objects, kind: Kind, content: bytes, name: str
) -> None:
    with pytest.raises(WrongType):
        await upload(objects, kind, content, name)


@pytest.mark.parametrize(
    ("kind", "content", "type_"),
    [
        (PICTURE, b"\xff\xd8\xff\xe0" + bytes(20), "image/jpeg"),
        (PICTURE, b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image/webp"),
        (MEDIA, b"RIFF\x00\x00\x00\x00WAVEfmt ", "audio/wav"),
        (MEDIA, b"\x00\x00\x00\x20ftypisom" + bytes(20), "video/mp4"),
        (MEDIA, b"\x00\x00\x00\x20ftypM4A " + bytes(20), "audio/mp4"),
        (MEDIA, b"ID3\x04" + bytes(20), "audio/mpeg"),
        (DOCUMENT, b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", filetypes.PDF),
        (DOCUMENT, archive("[Content_Types].xml", "word/document.xml"), filetypes.DOCX),
        (DOCUMENT, archive("[Content_Types].xml", "xl/workbook.xml"), filetypes.XLSX),
        (DOCUMENT, archive("[Content_Types].xml", "ppt/presentation.xml"), filetypes.PPTX),
        (DOCUMENT, b"\xef\xbb\xbf \n<!-- x --><!DOCTYPE HTML><p>", "text/html"),
        (DOCUMENT, "说明书\n".encode("gb18030"), "text/plain"),
        (DOCUMENT, "text".encode("utf-16"), "text/plain"),
        (DOCUMENT, "🙂 \u202eשלום".encode(), "text/plain"),
        (PACKAGE, archive("SKILL.md"), "application/zip"),
        (PACKAGE, archive("me.json"), "application/zip"),
        (DOCUMENT, archive("META-INF/container.xml"), "application/epub+zip"),
    ],
)
async def test_an_allowed_file_is_stored_with_its_type(
    objects: Objects, kind: Kind, content: bytes, type_: str
) -> None:
    stored = await upload(objects, kind, content)
    assert stored.content_type == type_
    await objects.delete(stored.path)


@pytest.mark.parametrize(
    ("name", "content", "type_"),
    [
        ("a.CSV", b"a,b\n1,2\n", "text/csv"),
        ("a.eml", b"Received: from x\nSubject: a\n\ntext", "message/rfc822"),
        ("a.eml", b"no field of an e-mail", "text/plain"),
        ("a.txt", b"Subject: a\n\ntext", "text/plain"),
        ("a.msg", b"Subject: a\n\ntext", "text/plain"),
        ("a.msg", b"GIF89a", "image/gif"),
        ("a.MSG", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "application/vnd.ms-outlook"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "application/x-ole-storage"),
        ("a.txt", "<html><body>hi".encode("utf-16"), "text/html"),
        ("page.html", b"Opening <b>hours</b>", "text/html"),
        ("page.HTM", b"<p>Opening hours", "text/html"),
        ("page", b'<meta charset="gbk"><title>x</title>', "text/html"),
        ("page", b"<!-- x --><table><tr><td>", "text/html"),
        ("README.md", b'<div align="center">\n\n# Pump\n\n</div>', "text/markdown"),
        ("README.md", b"<!doctype html><p>hi", "text/html"),
        ("a.csv", b"<table>,b", "text/csv"),
        ("a.txt", b"<tables> of a text", "text/plain"),
        ("page.mht", b"From: <Saved by Blink>\r\nSubject: x\r\n", "message/rfc822"),
        ("a.doc", b"{\\rtf1\\ansi a}", "application/rtf"),
        ("a.csv", "a,b".encode("utf-16"), "text/csv"),
        ("a.csv", "a,b".encode("utf-32"), "text/csv"),
        ("a.txt", b"\xff\xfe" + bytes(100), "application/octet-stream"),
    ],
)
def test_the_name_tells_kinds_apart_that_look_the_same(name: str, content: bytes, type_: str) -> None:
    assert filetypes.content_type(io.BytesIO(content), name) == type_


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("plan.pdf", "plan.pdf"),
        ("产品手册 v2.docx", "产品手册 v2.docx"),
        ("../../etc/passwd", "passwd"),
        ("C:\\files\\a.txt", "a.txt"),
        ("a\x00b\r\n.txt", "a_b_.txt"),
        ("gpj\u202egnp.exe", "gpjgnp.exe"),
        ('a"?#%&.md', "a_&.md"),
        ("..", "file"),
        ("", "file"),
        ("\ud800", "file"),
        ("e\u0301.txt", "é.txt"),
    ],
)
def test_names_are_made_safe(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_a_long_name_keeps_its_end() -> None:
    name = safe_name("长" * 500 + ".docx")
    assert name.endswith("长.docx")
    assert len(name.encode()) <= 200


async def test_a_text_is_stored_once_and_paths_are_listed_in_order(store: Stack, judge: Minio) -> None:
    bucket = f"b{uuid4().hex}"
    objects = Objects(**store.engines["s3"], bucket=bucket)
    assert await objects.paths("a/") == []
    for path in ("a/2", "a/1=", "ab/1", "a/1="):
        await objects.put_once(path, path.encode())
    await objects.put_once("a/2", b"another")
    assert await objects.paths("a/") == ["a/1=", "a/2"]
    with judge.get_object(bucket, "a/2") as response:
        assert response.read() == b"a/2"
    refused = Objects(**{**store.engines["s3"], "secret_key": "wrong"}, bucket=bucket)
    with pytest.raises(Transient):
        await refused.paths("a/")


async def test_more_objects_than_one_page_of_the_store_are_listed(objects: Objects, judge: Minio) -> None:
    await objects.put_once("crowd/0000", b"x")
    names = [f"crowd/{n:04}" for n in range(1, 1_002)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: judge.put_object(BUCKET, name, io.BytesIO(b"x"), 1), names))
    assert await objects.paths("crowd/") == ["crowd/0000", *names]


async def test_a_store_that_does_not_answer_is_a_transient_failure(store: Stack) -> None:
    nowhere = Objects("http://127.0.0.1:1", "a", "b")
    with pytest.raises(Transient):
        await nowhere.delete("x")


def test_an_archive_of_very_many_parts_is_refused_unread() -> None:
    """Its list of parts would take ten times its size: a few files at once would fill the memory of the service."""

    def of(parts: int) -> io.BytesIO:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as made:
            for n in range(parts):
                made.writestr(f"{n}{'x' * 1000}", b"")
        return out

    assert filetypes.content_type(of(3_000), "a.docx") == filetypes.ZIP
    with pytest.raises(InvalidMessage, match="too many parts"):
        filetypes.content_type(of(5_000), "a.docx")


@pytest.mark.parametrize(("mib", "uploads"), [(20, 0), (21, 1)])
async def test_a_file_of_a_chat_is_sent_in_one_request(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, mib: int, uploads: int
) -> None:
    """A killed process leaves no parts of it."""
    begin = Mock(wraps=objects._client._create_multipart_upload)
    monkeypatch.setattr(objects._client, "_create_multipart_upload", begin)
    large = Kind("text", 30 * 1024 * 1024, frozenset(filetypes.TEXTS))
    path = f"parts/{mib}"
    content = b"0123456789abcdef" * (mib * 1024 * 1024 // 16)
    await objects.upload(large, once(content), name="a.txt", user_id="u", path=lambda _: path)
    assert begin.call_count == uploads
    async with objects.fetch(path) as file:
        assert file.read() == content


@pytest.mark.parametrize(("status", "stays"), [(403, True), (400, False)])
async def test_an_account_that_may_not_list_parts_fails_no_check_of_an_upload(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, status: int, stays: bool
) -> None:
    refused = S3Error(urllib3.HTTPResponse(status=status), "Refused", None, None, None, None)
    monkeypatch.setattr(objects._client, "_execute", Mock(side_effect=refused))
    with nullcontext() if stays else pytest.raises(S3Error):
        await objects.delete_unfinished("documents/")
