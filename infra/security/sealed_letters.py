"""Payloads of dead letters are sealed under the key of the person whom they name: erasing the person erases them.

A payload without a person is sealed under the platform's key and expires (`infra.postgres.dead_letters.OPEN_FOR`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from infra.errors import Conflict
from infra.postgres.dead_letters import DeadLetter, SealedPayload
from infra.security.crypto import Cipher, DataKey
from infra.security.subjects import Subject, SubjectKeys

_PURPOSE = "dead letter"
# Finds the person in a broken message, too. A quote inside of a JSON text is escaped, so no text can look like a field.
_SUBJECT = re.compile(rb'"subject_id"\s*:\s*"([^"\\]{1,200})"')


class SealedLetters:
    """Implements `infra.postgres.dead_letters.Sealing`."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher
        self._subjects = SubjectKeys(cipher)

    async def seal(self, connection: AsyncConnection, letters: Sequence[DeadLetter]) -> list[SealedPayload]:
        subjects = [_subject(letter) for letter in letters]
        named = {subject for subject in subjects if subject}
        keys = await self._subjects.keys_of(connection, named) if named else {}
        return [
            self._under_subject(letter, subject, keys[subject]) if subject else self._under_platform(letter)
            for letter, subject in zip(letters, subjects, strict=True)
        ]

    async def open(
        self, connection: AsyncConnection, tenant_id: str | None, message_id: str, payload: SealedPayload
    ) -> bytes:
        if payload.subject_id is None:
            return self._cipher.open(payload.content, _PURPOSE, tenant_id or "", message_id) if payload.content else b""
        subject = tenant_id or "", payload.subject_id
        key = (await self._subjects.keys_of(connection, [subject]))[subject] if payload.content else None
        if key is None:
            raise Conflict("payload: was erased with its person; the dead letter can only be discarded")
        return key.open(payload.content, *subject, message_id, _PURPOSE).encode("latin-1")

    def _under_platform(self, letter: DeadLetter) -> SealedPayload:
        sealed = self._cipher.seal(letter.payload, _PURPOSE, letter.tenant_id or "", letter.message_id)
        return SealedPayload(sealed, None)

    def _under_subject(self, letter: DeadLetter, subject: Subject, key: DataKey | None) -> SealedPayload:
        # Latin-1 has a character for each byte: a payload may be any bytes, and the key seals texts.
        content = key.seal(letter.payload.decode("latin-1"), *subject, letter.message_id, _PURPOSE) if key else b""
        return SealedPayload(content, subject[1])


def _subject(letter: DeadLetter) -> Subject | None:
    found = _SUBJECT.search(letter.payload)
    return (letter.tenant_id, found[1].decode(errors="replace")) if found and letter.tenant_id else None
