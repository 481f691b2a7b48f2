"""Receives a document: a file in a form, or a URL from which the platform fetches it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import IO, NamedTuple
from urllib.parse import unquote
from uuid import UUID

import httpx2
import msgspec
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request

from infra.errors import InvalidMessage, WrongType
from infra.outgoing.client import Outgoing
from infra.security.auth import Identity
from infra.stores import filetypes
from infra.stores.objects import MEMORY_BYTES, Stored, safe_name
from infra.web.http import allow_body, media_type, read_json
from services.memory import rights
from services.memory.knowledge.uploads import DOCUMENT, Uploads

# The most bytes that multipart adds around a file.
_FORM_BYTES = 65_536
_MAX_NAME = 255
_MAX_REDIRECTS = 5
_FETCH_SECONDS = 60.0


class ReceivedDocument(NamedTuple):
    name: str
    stored: Stored
    audience: list[str]
    """Empty if none is given."""
    tags: list[str]


class _Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    name: str | None = None
    audience: list[str] = []
    tags: list[str] = []


async def receive(request: Request, outgoing: Outgoing, uploads: Uploads, who: Identity, id_: UUID) -> ReceivedDocument:
    """Stores the file of the request under the id. Raises InvalidMessage naming the wrong field, WrongType, TooLarge,
    TooManyRequests, Transient."""
    type_ = media_type(request.headers)
    if type_ == "application/json":
        with uploads.receiving(who.tenant_id):
            return await _fetched(request, outgoing, uploads, who, id_)
    if type_ != "multipart/form-data":
        raise WrongType("content-type", "must be multipart/form-data, or application/json with a url")
    _, options = parse_options_header(request.headers["content-type"])
    # The form would be decoded in any charset that Python knows, also in one that takes quadratic time.
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise WrongType("content-type", "its charset must be utf-8")
    allow_body(request.scope, DOCUMENT.max_bytes + _FORM_BYTES)
    is_small = int(request.headers.get("content-length", DOCUMENT.max_bytes)) <= MEMORY_BYTES
    with nullcontext() if is_small else uploads.receiving(who.tenant_id):
        return await _of_form(request, uploads, who, id_)


async def _of_form(request: Request, uploads: Uploads, who: Identity, id_: UUID) -> ReceivedDocument:
    async with request.form(max_files=1, max_fields=2 * rights.MAX_NAMES) as form:
        file = form.get("file")
        if file is None:
            raise InvalidMessage("file", "missing: must be a multipart field of this name")
        if not isinstance(file, UploadFile):
            # Some clients send filename* alone, which RFC 7578 forbids.
            raise InvalidMessage(
                "file", 'must have a filename: content-disposition: form-data; name="file"; filename=…'
            )
        name = checked_name("file", file.filename)
        audience, tags = _checked(_texts(form, "audience"), _texts(form, "tags"))
        return ReceivedDocument(name, await _store(uploads, file.file, name, who, id_), audience, tags)


async def _fetched(
    request: Request, outgoing: Outgoing, uploads: Uploads, who: Identity, id_: UUID
) -> ReceivedDocument:
    link = await read_json(request, _Link)
    audience, tags = _checked(link.audience, link.tags)
    name = None if link.name is None else checked_name("name", link.name)
    try:
        # Otherwise a server that sends a byte from time to time could hold the request forever.
        async with (
            asyncio.timeout(_FETCH_SECONDS),
            outgoing.client(_FETCH_SECONDS) as client,
            _answer(client, link.url) as answer,
        ):
            if answer.status_code != 200:
                raise InvalidMessage("url", f"its server answered HTTP {answer.status_code}")
            name = name or _name_of(answer)
            return ReceivedDocument(name, await _store(uploads, answer.aiter_bytes(), name, who, id_), audience, tags)
    except (httpx2.HTTPError, TimeoutError) as error:
        raise InvalidMessage("url", f"could not be fetched: {type(error).__name__}") from error


@asynccontextmanager
async def _answer(client: httpx2.AsyncClient, url: str) -> AsyncIterator[httpx2.Response]:
    """The answer after at most so many redirects; the guard checks each address."""
    for _ in range(_MAX_REDIRECTS + 1):
        with _named():
            request = client.build_request("GET", url, extensions={"max_bytes": DOCUMENT.max_bytes + 1})
        if request.url.scheme not in ("http", "https") or not request.url.host or request.url.userinfo:
            raise InvalidMessage("url", "must begin with http:// or https:// and a host, without a user")
        answer = await client.send(request, stream=True)
        try:
            if not answer.has_redirect_location:
                yield answer
                return
            with _named():
                url = str(request.url.join(answer.headers["location"]))
        finally:
            await answer.aclose()
    raise InvalidMessage("url", f"redirects more than {_MAX_REDIRECTS} times")


@contextmanager
def _named() -> Iterator[None]:
    """Names the field of a malformed address, also of a redirect."""
    try:
        yield
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise InvalidMessage("url", str(error)) from error


def _name_of(answer: httpx2.Response) -> str:
    last = unquote(answer.url.path.rstrip("/").rpartition("/")[2]) or answer.url.host
    type_ = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    extensions = filetypes.EXTENSIONS.get(type_)
    if extensions and not last.lower().endswith(extensions):
        last += extensions[0]
    return checked_name("url", safe_name(last))


def _checked(audience: list[str], tags: list[str]) -> tuple[list[str], list[str]]:
    return (rights.checked_audience(audience) if audience else []), rights.checked_tags(tags)


async def _store(
    uploads: Uploads, content: AsyncIterator[bytes] | IO[bytes], name: str, who: Identity, id_: UUID
) -> Stored:
    user_id = who.actor.partition(":")[2]
    return await uploads.store(content, name=name, tenant_id=who.tenant_id, user_id=user_id, id_=id_)


def _texts(form: FormData, field: str) -> list[str]:
    """The texts of a field that is repeated, or given once as a JSON array."""
    given = form.getlist(field)
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise InvalidMessage(field, "must be a text, not a file")
    if len(texts) == 1 and texts[0].startswith("["):
        try:
            return msgspec.json.decode(texts[0], type=list[str])
        except msgspec.DecodeError:
            raise InvalidMessage(field, "must be a JSON array of texts") from None
    return texts


def checked_name(field: str, given: str | None) -> str:
    """The sender's name of the file, without folders and invisible characters."""
    name = "".join(letter for letter in given or "" if letter.isprintable())
    name = re.split(r"[/\\]", name)[-1].strip()
    if not name:
        raise InvalidMessage(field, "must have a name")
    if len(name) > _MAX_NAME:
        raise InvalidMessage(field, f"its name must have at most {_MAX_NAME} characters")
    return name
