"""Files in the result of a tool, which are taken out of it: they are for the person, and the model cannot read them."""

from __future__ import annotations

import base64
from mimetypes import guess_extension
from typing import Any

from infra.stores.objects import safe_name
from infra.web import data_urls
from services.plugin.domain import MAX_FILES, MAX_FILES_BYTES, ToolFile


class ResultFiles:
    """The files of one result: at most MAX_FILES with MAX_FILES_BYTES together. Further ones are left out."""

    def __init__(self) -> None:
        self.taken: list[ToolFile] = []
        self._left = MAX_FILES_BYTES

    def take(self, what: str, mime_type: str, encoded: str, name: str = "") -> str:
        """Takes a file in base64, if it is one and not too large. Returns a note for its place in the text."""
        size = len(encoded) * 3 // 4
        content = b""
        if len(self.taken) < MAX_FILES and size <= self._left:
            try:
                content = base64.b64decode(encoded, validate=True)
            except ValueError:
                content = b""
        if not content:
            return f"[{what} left out: {mime_type}, {size} bytes]"
        extension = guess_extension(mime_type) or ""
        # Two files with one name would be one to a person.
        named = f"{safe_name(name).removesuffix(extension) if name else what}-{len(self.taken) + 1}{extension}"
        self.taken.append(ToolFile(named, content))
        self._left -= len(content)
        return f"[file {named}: {mime_type}, {len(content)} bytes]"

    def taken_out(self, value: Any) -> Any:
        """The JSON value with a note in place of each data URL."""
        match value:
            case str():
                return data_urls.replaced(value, lambda name, mime, data: self.take("file", mime, data, name))
            case dict():
                return {key: self.taken_out(part) for key, part in value.items()}
            case list():
                return [self.taken_out(part) for part in value]
            case _:
                return value
