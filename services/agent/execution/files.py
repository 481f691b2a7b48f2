"""Files for the person of a channel: from tools, and from data URLs in the answer and in those of other agents.

They are stored under the person's id and the tenant's, so that the erasure of the person finds them, and are sent after
the answer.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from mimetypes import guess_extension

from infra.errors import InvalidMessage, TooLarge, WrongType
from infra.stores import filetypes
from infra.stores.objects import Kind, Objects, once, safe_name
from infra.web import data_urls
from services.agent.execution.context import RunContext
from services.agent.runs.content import StoredFile

MAX_FILES = 10
"""Of one answer."""
FILE = Kind(
    "file",
    8 * 1024 * 1024,
    frozenset(("image/", "audio/", "video/", filetypes.PDF, *filetypes.OFFICE, filetypes.RTF, *filetypes.TEXTS)),
)


@dataclass
class RunFiles:
    """The files of one run."""

    context: RunContext
    objects: Objects | None
    _stored: dict[int, tuple[StoredFile, ...]] = field(default_factory=dict)
    """By the step that made them."""

    def add(self, step: int, files: tuple[StoredFile, ...]) -> None:
        """Stored files of a step, which may have been made by an earlier attempt of the run."""
        if files:
            self._stored[step] = files

    async def keep(self, step: int, n: int, name: str, content: bytes) -> StoredFile | str:
        """Stores file `n` of a step; a repetition stores it again. Returns the reason if it is not sent.

        Raises Transient if the store does not answer.
        """
        context = self.context
        if self.objects is None or not await context.is_in_chat():
            return "only a chat shows files"
        if n > MAX_FILES:
            return f"an answer has at most {MAX_FILES} files"
        path = f"{context.subject_id}/attachments/{context.tenant_id}/{context.run_id}_{step}_{n}_{safe_name(name)}"
        try:
            await self.objects.upload(FILE, once(content), name=name, user_id=context.subject_id, path=lambda _: path)
        except (InvalidMessage, WrongType, TooLarge) as error:
            return str(error)
        return StoredFile(path, safe_name(name))

    async def taken_out(self, step: int, text: str) -> tuple[str, tuple[StoredFile, ...]]:
        """The text of a step with names in place of its data URLs, and their files. The text also says which of them
        are not sent, and why.

        Raises Transient if the store does not answer.
        """
        found: list[tuple[str, bytes]] = []

        def take(name: str, mime_type: str, data: str) -> str:
            try:
                content = base64.b64decode(data, validate=True)
            except ValueError:
                content = b""
            extension = guess_extension(mime_type) or ""
            named = safe_name(f"{name.removesuffix(extension) or 'file'}{extension}")
            found.append((named, content))
            return f"[{named}]"

        text = data_urls.replaced(text, take)
        kept = [await self.keep(step, n, *file) for n, file in enumerate(found, 1)]
        lost = [f"{name}: {why}" for (name, _), why in zip(found, kept, strict=True) if isinstance(why, str)]
        text += "".join(f"\n\n[{one}]" for one in lost)
        return text, tuple(file for file in kept if isinstance(file, StoredFile))

    async def of_answer(self, text: str) -> tuple[str, tuple[StoredFile, ...]]:
        """The text of an answer as by `taken_out`, and all files to send with it, in their order. The answer to another
        agent stays as it is: that agent's run takes its data URLs out.

        Raises Transient if the store does not answer.
        """
        if self.objects is None or self.context.channel_id is None:
            return text, ()
        text, own = await self.taken_out(self.context.last_step, text)
        of_tools = [file for step in sorted(self._stored) for file in self._stored[step]]
        return text, (*of_tools, *own)[:MAX_FILES]
