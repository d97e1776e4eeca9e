"""torch.utils.data: a loader goes through the items of a data set in batches, in the order of the data set: a drawn one
is nobody's to know."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fairway.audit.trial.acting import Act
from fairway.audit.trial.arguments import group
from fairway.audit.trial.arrays import Array, scalar
from fairway.audit.trial.core import Core
from fairway.audit.trial.making import tensor
from fairway.audit.trial.shapes import stack
from fairway.audit.trial.values import UNKNOWN, Obj, Value


@dataclass(frozen=True)
class Loader:
    """A DataLoader, which may be gone through more than once."""

    machine: Core
    dataset: Value
    told: dict[str, Value]
    line: int

    def __iter__(self) -> Iterator[Value]:
        size = scalar(self.told.get("batch_size", 1))
        if size is None and "batch_sampler" not in self.told:
            yield from self._items()
            return
        for rows in self._groups(size):
            self.machine.step()
            yield self._batch(rows)

    def _groups(self, size: Any) -> Iterator[list[Value]]:
        chosen = self.told.get("batch_sampler")
        if chosen is not None:
            for places in self.machine.items(chosen):
                yield [self.machine.item(self.dataset, place) for place in self.machine.items(places)]
            return
        items = self._items()
        while rows := list(itertools.islice(items, size if isinstance(size, int) and size > 0 else 1)):
            if self.told.get("drop_last") is not True or len(rows) == size:
                yield rows

    def _items(self) -> Iterator[Value]:
        """By its places where the data set is asked for them; else as it is gone through."""
        sampler = self.told.get("sampler")
        if sampler is not None:
            yield from (self.machine.item(self.dataset, place) for place in self.machine.items(sampler))
        elif isinstance(self.dataset, Obj) and self.dataset.kind.find("__getitem__") is not None:
            yield from (self.machine.item(self.dataset, place) for place in range(_length(self.dataset)))
        else:
            yield from self.machine.items(self.dataset)

    def _batch(self, rows: list[Value]) -> Value:
        collate = self.told.get("collate_fn")
        return self.machine.call(collate, (rows,), {}, self.line) if collate is not None else _stacked(rows)


def _length(dataset: Value) -> int:
    method = dataset.kind.find("__len__") if isinstance(dataset, Obj) else None
    found = method(dataset) if method is not None else len(dataset) if isinstance(dataset, (list, tuple)) else 0
    return found if isinstance(found, int) else 0


def _stacked(rows: list[Value]) -> Value:
    """What torch makes of rows where nobody says: arrays on top of each other, tuples and dicts part by part."""
    first = rows[0]
    if isinstance(first, (tuple, list)):
        return type(first)(_stacked(list(column)) for column in zip(*rows, strict=False))
    if isinstance(first, dict):
        return {name: _stacked([row[name] for row in rows]) for name in first}
    if isinstance(first, Array):
        return stack(rows)
    return tensor(rows) if isinstance(first, (int, float)) else rows


def loader(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """DataLoader(dataset, batch_size, shuffle, sampler, batch_sampler, ...)"""
    names = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler")
    told = {**dict(zip(names, args, strict=False)), **kwargs}
    dataset = told.pop("dataset", UNKNOWN)
    return Loader(
        machine,
        dataset,
        {name: value for name, value in told.items() if value is not None or name == "batch_size"},
        line,
    )


def side_by_side(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """TensorDataset(x, y)"""
    return list(zip(*(machine.items(each) for each in args), strict=False))


def sampler(shared: bool) -> Act:
    """SequentialSampler, RandomSampler: the places of a data set; DistributedSampler: those of a rank, of which as many
    as are lacking are filled up from the first ones, unless the last are dropped."""

    def act(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
        given = args[0] if args else kwargs.get("dataset", kwargs.get("data_source", UNKNOWN))
        places = list(range(_length(given)))
        if not shared:
            return places
        rank, size = group.get()
        rank, size = scalar(kwargs.get("rank", rank)), scalar(kwargs.get("num_replicas", size))
        if not (isinstance(rank, int) and isinstance(size, int) and size > 0):
            return UNKNOWN
        if kwargs.get("drop_last") is True:
            return places[: len(places) // size * size][rank::size]
        return (places + places[: -len(places) % size])[rank::size]

    return act


__all__ = ["loader", "sampler", "side_by_side"]
