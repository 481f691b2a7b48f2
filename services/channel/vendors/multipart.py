"""The body of an HTTP form with one file (RFC 7578)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping


def multipart(
    fields: Mapping[str, str], field: str, name: str, content_type: str, content: bytes
) -> tuple[dict[str, str], bytes]:
    """The header and the body of a form with `fields` and, in the field `field`, a file.

    `name`: without quotes and control characters, as `safe_name` returns it.
    """
    boundary = secrets.token_hex(16)
    texts = "".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in fields.items()
    )
    head = (
        f'{texts}--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
        f"Content-Type: {content_type}\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    return {"content-type": f"multipart/form-data; boundary={boundary}"}, body
