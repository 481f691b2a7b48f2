"""Tool calls that a server streams in pieces."""

from __future__ import annotations

from typing import Any

import msgspec

Chunk = dict[str, Any]


class _Call:
    def __init__(self, index: int, given_id: str | None, id_: str) -> None:
        self.index = index
        self.given_id = given_id
        self.id = id_
        self.arguments = ""

    @property
    def is_complete(self) -> bool:
        try:
            return isinstance(msgspec.json.decode(self.arguments), dict)
        except msgspec.DecodeError:
            return False


class ToolCalls:
    """Gives each tool call an index and an id of its own.

    A piece with a name begins a call, unless the server repeats the name in each piece. A piece without one continues
    the call with its index, else with its id, else the last one.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}

    @property
    def count(self) -> int:
        return len(self._calls)

    def feed(self, pieces: list[Any]) -> list[Chunk]:
        return [self._piece(piece) for piece in pieces if isinstance(piece, dict)]

    def _piece(self, piece: Chunk) -> Chunk:
        index, given_id = piece.get("index"), piece.get("id") or None
        function = piece.get("function") or {}
        name, arguments = function.get("name") or None, function.get("arguments")
        if arguments is None:
            arguments = ""
        elif not isinstance(arguments, str):
            arguments = msgspec.json.encode(arguments).decode()
        call = self._found(index, given_id)
        if call is None and name is None and self._calls:
            call = self._calls[-1]
        if call is None or (name and self._begins(call, given_id, arguments)):
            call = self._new(given_id)
        else:
            name = None
        if isinstance(index, int):
            self._by_index[index] = call
        is_first = not call.arguments and name is not None
        call.arguments += arguments
        sent: Chunk = {"index": call.index, "function": {"arguments": arguments}}
        if is_first:
            sent |= {"id": call.id, "type": "function", "function": {"name": name, "arguments": arguments}}
        return sent

    def _found(self, index: object, given_id: str | None) -> _Call | None:
        same = [call for call in self._calls if given_id and call.given_id == given_id]
        if isinstance(index, int):
            call = self._by_index.get(index)
            # Some servers write several calls in turns under one index.
            return same[-1] if call and call.given_id and same and call not in same else call
        if same:
            return same[-1]
        return self._calls[-1] if self._calls and not given_id else None

    def _begins(self, call: _Call, given_id: str | None, arguments: str) -> bool:
        if given_id and call.given_id and given_id != call.given_id:
            return True
        return call.is_complete and bool(arguments.strip())

    def _new(self, given_id: str | None) -> _Call:
        index = len(self._calls)
        taken = {call.id for call in self._calls}
        id_ = given_id or f"call_{index}"
        call = _Call(index, given_id, id_ if id_ not in taken else f"{id_}_{index}")
        self._calls.append(call)
        return call
