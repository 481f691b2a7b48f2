"""The images in a message of the API: put into the object store, so that no event holds their bytes.

They are stored under the caller's id and the tenant's: the erasure of the caller deletes them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

from infra.errors import InvalidMessage, TooLarge
from infra.security.auth import Identity
from infra.stores.objects import Kind, Objects, once
from protos.images import IMAGE_TYPES, MAX_IMAGE_BYTES
from services.agent.models.contract import Image

IMAGE = Kind("image", MAX_IMAGE_BYTES, IMAGE_TYPES)


async def store(objects: Objects, who: Identity, urls: Iterable[tuple[str, str]]) -> dict[str, Image]:
    """The stored image of each data URL; `urls` has pairs of the field's name and the URL.

    An image that was stored before, as part of the same conversation, is replaced by itself.
    Raises InvalidMessage naming the field, Transient if the store does not answer.
    """
    folder = f"{who.actor}/attachments/{who.tenant_id}"
    stored: dict[str, Image] = {}
    for field, url in urls:
        if url in stored or not url.startswith("data:"):
            continue
        try:
            content = base64.b64decode(url.partition(",")[2], validate=True)
            file = await objects.upload(
                IMAGE, once(content), name="image", user_id=who.actor, path=lambda sha256: f"{folder}/image_{sha256}"
            )
        except ValueError as error:
            raise InvalidMessage(field, "must be valid base64") from error
        except InvalidMessage as error:
            raise InvalidMessage(field, error.reason) from error
        except TooLarge as error:
            raise InvalidMessage(field, str(error).removeprefix("file: ")) from error
        stored[url] = Image(path=file.path, content_type=file.content_type)
    return stored
