"""The objects of an abstract run, and a journal that lets two branches start from the same state and be joined."""

from __future__ import annotations

from typing import Any

from fairway.audit.flow.values import MISSING, Value, join


class Obj:
    """An object with an identity.

    kind: "function", "class", "instance", "list", "dict", "tensor", "frame", "module" (a script), "foreign" (a name
    that is not in the script), "thing" (made by a foreign class), "bound", "partial", "generator"
    data: what never changes (the AST node and its frame, a dotted name, a class)
    slots: attributes, variables, items; names with `#` are the interpreter's own: #content, #learned, #grad...
    owner: the model that it is a part of; born: the loops it was made in
    """

    __slots__ = ("born", "data", "kind", "number", "owner", "place", "slots")

    def __init__(self, number: int, kind: str, data: Any = None, born: Any = (), place: Any = None) -> None:
        self.number, self.kind, self.data, self.born, self.place = number, kind, data, born, place
        self.slots: dict[Any, Any] = {}
        self.owner: Obj | None = None

    def __repr__(self) -> str:
        name = self.data if isinstance(self.data, str) else getattr(self.data, "name", "")
        return f"<{self.kind} {name or self.number}>"

    @property
    def root(self) -> Obj:
        """The outermost model that this is a part of."""
        found = self
        for _ in range(40):
            if found.owner is None or found.owner is self:
                break
            found = found.owner
        return found


Change = dict[tuple[Obj, Any], Any]


class Heap:
    """All objects; `set` is the only way to change one while branches are open."""

    def __init__(self) -> None:
        self.count = 0
        self.open = 0  # branches under way; without any, nothing need be written down
        self._journal: list[tuple[Obj, Any, Any]] = []

    def new(self, kind: str, data: Any = None, born: Any = (), place: Any = None) -> Obj:
        """A new object."""
        self.count += 1
        return Obj(self.count, kind, data, born, place)

    def set(self, obj: Obj, key: Any, value: Any) -> None:
        """Write a slot."""
        if self.open:
            self._journal.append((obj, key, obj.slots.get(key, MISSING)))
        obj.slots[key] = value

    def drop(self, obj: Obj, key: Any) -> None:
        """Delete a slot."""
        if key in obj.slots:
            if self.open:
                self._journal.append((obj, key, obj.slots[key]))
            del obj.slots[key]

    def mark(self) -> int:
        """A place in the journal, to go back to."""
        return len(self._journal)

    def changes(self, mark: int) -> Change:
        """What was changed since, with its present values."""
        return {(obj, key): obj.slots.get(key, MISSING) for obj, key, _ in self._journal[mark:]}

    def back(self, mark: int) -> None:
        """Undo what was changed since."""
        journal = self._journal
        while len(journal) > mark:
            obj, key, old = journal.pop()
            if old is MISSING:
                obj.slots.pop(key, None)
            else:
                obj.slots[key] = old

    def close(self) -> None:
        """A branch is done."""
        self.open -= 1
        if not self.open:
            self._journal.clear()

    def merge(self, outcomes: list[Change]) -> None:
        """One of the outcomes happened; each is told by what it changed."""
        if len(outcomes) == 1:
            for (obj, key), value in outcomes[0].items():
                self._put(obj, key, value)
            return
        uneven: list[tuple[Obj, list[Any]]] = []
        for obj, key in {each: None for outcome in outcomes for each in outcome}:
            base = obj.slots.get(key, MISSING)
            values = [outcome.get((obj, key), base) for outcome in outcomes]
            joined = values[0]
            for value in values[1:]:
                joined = joined_slot(joined, value)
            if key == "#items" and isinstance(joined, Value) and joined.items is None:
                uneven.append((obj, values))
            self._put(obj, key, joined)
        for obj, values in uneven:
            self._pour(obj, values)

    def _pour(self, obj: Obj, lists: list[Any]) -> None:
        """A list of another length on each way: what it may hold is known, how many of it is not."""
        self.drop(obj, "#items")
        found = obj.slots.get("#elem", MISSING)
        for each in lists:
            for item in (each.items or ()) if isinstance(each, Value) else ():
                found = joined_slot(found, item)
        self._put(obj, "#elem", found)

    def _put(self, obj: Obj, key: Any, value: Any) -> None:
        if value is MISSING:
            self.drop(obj, key)
        else:
            self.set(obj, key, value)


def joined_slot(one: Any, other: Any) -> Any:
    """Two states of one slot: values are joined, masks united; what is missing on one side is taken from the other."""
    if one is MISSING or one is other:
        return other
    if other is MISSING:
        return one
    if isinstance(one, Value) and isinstance(other, Value):
        return join(one, other)
    if isinstance(one, int) and isinstance(other, int):
        return one | other
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one if len(one) >= len(other) else other
    if isinstance(one, str) and isinstance(other, str):
        return max(one, other)  # of #rows: "one" for all windows on either side
    return other
