"""The content of a message: its text, and its images."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from typing import Any

from infra.errors import InvalidMessage
from infra.stores import filetypes
from protos.images import IMAGE_TYPES, MAX_IMAGE_BYTES
from services.ws_gateway.openai.errors import invalid_field
from services.ws_gateway.openai.fields import check, string

# The text parts of a content, and the field that has the text.
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# The image parts of a content: the field is the address, or in chat completions an object that has it.
_IMAGES = ("image_url", "input_image")
# The notes in a function's result, in the place of parts that the model does not see.
_NOTES = {
    **dict.fromkeys(_IMAGES, "[image left out]"),
    **dict.fromkeys(("input_file", "file"), "[file left out]"),
}
# Thoughts of another server's model, among the parts of its message: nothing that this agent could go on from.
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
_DATA_URL = re.compile(r"data:[^,]{0,100};base64,([A-Za-z0-9+/]+={0,2})")
# The type stands in the first bytes. The number of characters is a multiple of four, as base64 needs.
_HEAD = 64


def text_and_images(content: Any, where: str, role: Any) -> tuple[str, tuple[str, ...]]:
    """Only a user's images are shown to the model. Those in a function's result are left out."""
    images: tuple[str, ...] = ()
    seen = role == "user"
    if isinstance(content, list):
        parts = [(part, f"{where}[{n}]") for n, part in enumerate(content) if not _is_thought(part, seen=seen)]
        shown = [one for one in parts if seen and isinstance(one[0], dict) and one[0].get("type") in _IMAGES]
        images = tuple(_image(part, place) for part, place in shown)
        notes = _NOTES if role == "tool" else {}
        content = "\n".join(_part(part, place, notes) for part, place in parts if (part, place) not in shown)
    check(content is None or isinstance(content, str), where, "must be text or a list of parts")
    return string(content or "", where), images


def _is_thought(part: Any, *, seen: bool) -> bool:
    return not seen and isinstance(part, dict) and part.get("type") in _THOUGHTS


def _image(part: Mapping[str, Any], where: str) -> str:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    where = f"{where}.image_url"
    if not isinstance(url, str):
        raise invalid_field(where, "must be the address of an image")
    if url.startswith("data:"):
        data = _DATA_URL.fullmatch(url)
        # By the content: clients often name another type.
        is_image = data is not None and len(data[1]) % 4 == 0 and _type(data[1]) in IMAGE_TYPES
        check(is_image, where, "must be base64 of a png, jpeg, gif or webp image")
        check(len(url) <= MAX_IMAGE_BYTES * 4 // 3, where, f"must have {MAX_IMAGE_BYTES // 1024**2} MB at most")
    else:
        check(url.startswith("https://") and len(url) <= 2_000, where, "must begin with data: or https://")
    return url


def _type(data: str) -> str:
    try:
        return filetypes.content_type(io.BytesIO(base64.b64decode(data[:_HEAD])), "")
    except InvalidMessage:
        return filetypes.UNKNOWN  # the beginning of an archive


def _part(part: Any, where: str, notes: Mapping[str, str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in notes:
        return notes[kind]
    name = _TEXTS.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise invalid_field(f"{where}.type", "only text, and images of the user, are supported")
    text = part.get(name)
    if not isinstance(text, str):
        raise invalid_field(f"{where}.{name}", "must be text")
    return text
