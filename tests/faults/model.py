"""A model of the kernel's promises in memory: messages, dead letters and effects, without database, broker or crash."""

from __future__ import annotations

from tests.faults.world import PARTITIONS, Note

KEYS = ("a", "b", "c", "d")


class Model:
    """The state that the database must have. `letters`: parked key → its open dead letters in order."""

    def __init__(self, refused: set[Note]) -> None:
        self.written = dict.fromkeys(KEYS, 0)
        self.pending: set[Note] = set()
        self.positions = [0] * PARTITIONS
        self.effects: dict[str, list[int]] = {key: [] for key in KEYS}
        self.discarded: set[Note] = set()
        self.letters: dict[str, list[tuple[Note, str]]] = {}
        self.refused = refused
        self.garbage = 0

    @property
    def notes(self) -> set[Note]:
        return {Note(key, number) for key, count in self.written.items() for number in range(1, count + 1)}

    def read(self, note: Note) -> None:
        """A record of the log comes to the consumer."""
        if note.number in self.effects[note.key] or note in self.discarded:
            return
        if note.key in self.letters:
            if note not in dict(self.letters[note.key]):
                self.letters[note.key].append((note, "waiting"))
        elif self.refuses(note):
            self.letters[note.key] = [(note, "failed")]
        else:
            self.effects[note.key].append(note.number)

    def refuses(self, note: Note) -> bool:
        return note in self.refused or note.number < 0

    def drain(self, *, stopped: bool) -> bool:
        """One step of the redriver. True if it was `stopped` just before an effect."""
        for key, letters in list(self.letters.items()):
            if not letters:
                del self.letters[key]
                return False
            note, state = letters[0]
            if state == "failed":
                continue
            if self.refuses(note):
                letters[0] = (note, "failed")
            elif stopped:
                return True
            else:
                letters.pop(0)
                self.effects[key].append(note.number)
            return False
        return False
