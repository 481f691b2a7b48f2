"""Voice to text, by an OpenAI-shaped endpoint: https://platform.openai.com/docs/api-reference/audio/createTranscription"""

from __future__ import annotations

import msgspec

from infra.errors import EffectFailed, Transient
from infra.outgoing.client import Outgoing
from infra.stores.objects import safe_name
from services.channel.vendors.base import MALFORMED
from services.channel.vendors.multipart import multipart

TIMEOUT_SECONDS = 180.0
# The endpoint judges the format by the name's extension.
_EXTENSIONS = {
    "audio/ogg": "ogg",
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "video/mp4": "mp4",
    "video/webm": "webm",
}


class _Answer(msgspec.Struct):
    text: str


class Transcription:
    """`base_url` ends in ``/v1``."""

    def __init__(self, outgoing: Outgoing, base_url: str, model: str, api_key: str | None) -> None:
        self._outgoing = outgoing
        self._url = f"{base_url.rstrip('/')}/audio/transcriptions"
        self._model = model
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}

    async def text(self, content: bytes, name: str, type_: str) -> str:
        """The spoken words. Raises EffectFailed, Transient, Unanswered."""
        extension = _EXTENSIONS.get(type_)
        if extension is None:
            raise EffectFailed(f"audio of type {type_} cannot be transcribed")
        stem = safe_name(name or "voice").rpartition(".")[0] or "voice"
        header, body = multipart({"model": self._model}, "file", f"{stem}.{extension}", type_, content)
        answer = await self._outgoing.request(
            "POST",
            self._url,
            headers=self._headers | header,
            content=body,
            timeout=TIMEOUT_SECONDS,
        )
        if answer.status == 429 or answer.status >= 500:
            raise Transient(f"transcription: HTTP {answer.status}")
        if answer.status != 200:
            raise EffectFailed(f"the transcription was refused: HTTP {answer.status}")
        try:
            return msgspec.json.decode(answer.body, type=_Answer).text
        except MALFORMED as error:
            raise EffectFailed("the answer of the transcription is malformed") from error
