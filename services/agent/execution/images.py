"""Images of a prompt: read from the object store for a call, or left out for a model that takes none."""

from __future__ import annotations

import base64

import msgspec

from infra.errors import NotFound
from infra.stores.objects import Objects
from services.agent.models.contract import Image, Prompt, UserTurn

# The tokens of one image, for estimates: providers charge at most about this much for a large one.
IMAGE_TOKENS = 1_600

_UNREADABLE = "[{} sent with this message cannot be read by the model. Tell the person so.]"


async def loaded(prompt: Prompt, objects: Objects | None) -> Prompt:
    """The prompt with the contents of its stored images. The model is told of an image that is gone."""
    if not count(prompt):
        return prompt
    turns = []
    for turn in prompt.turns:
        if isinstance(turn, UserTurn) and turn.images:
            found = [await _loaded(image, objects) for image in turn.images]
            kept = tuple(image for image in found if image)
            turn = msgspec.structs.replace(turn, text=_with_notice(turn.text, len(found) - len(kept)), images=kept)
        turns.append(turn)
    return msgspec.structs.replace(prompt, turns=tuple(turns))


async def _loaded(image: Image, objects: Objects | None) -> Image | None:
    if not image.path:
        return image
    if objects is None:
        return None
    try:
        async with objects.fetch(image.path) as file:
            content = base64.b64encode(file.read()).decode()
    except NotFound:
        # Its person was erased.
        return None
    return Image(url=f"data:{image.content_type};base64,{content}", content_type=image.content_type)


def count(prompt: Prompt) -> int:
    return sum(len(turn.images) for turn in prompt.turns if isinstance(turn, UserTurn))


def without(prompt: Prompt, *, notice: bool) -> Prompt:
    """The prompt without its images. `notice`: the model is told of them."""
    turns = tuple(
        msgspec.structs.replace(
            turn, images=(), text=_with_notice(turn.text, len(turn.images)) if notice else turn.text
        )
        if isinstance(turn, UserTurn) and turn.images
        else turn
        for turn in prompt.turns
    )
    return msgspec.structs.replace(prompt, turns=turns)


def _with_notice(text: str, images: int) -> str:
    if not images:
        return text
    notice = _UNREADABLE.format("An image" if images == 1 else f"{images} images")
    return f"{text}\n\n{notice}" if text else notice
