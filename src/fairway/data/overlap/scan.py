"""The scan: held-out documents are kept as keys and signatures, training documents stream past them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fairway.base.journal import Run
from fairway.data.building.processes import workers
from fairway.data.overlap.documents import Batch
from fairway.data.overlap.minhash import Bands, Uint32, estimates, shingles, signatures

T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """A held-out document and a training document that is alike. alike: 1 for the same, else the estimated Jaccard
    index of their shingles."""

    held_out: str
    train: str
    alike: float
    text: bytes  # the beginning of the held-out one


@dataclass(frozen=True)
class Overlap:
    """What the scan found; counts are of documents, bytes of the text (of tokens: two each).

    Documents without content are left out: those among the held-out ones are counted in `empty`.
    exact: held-out documents that stand in the training text too; near: others, at least `limit` alike; train_exact and
    train_near: training documents like that.
    """

    held_out: int
    held_out_bytes: int
    train: int
    train_bytes: int
    exact: int
    exact_bytes: int
    near: int
    near_bytes: int
    train_exact: int
    train_near: int
    empty: int
    limit: float
    examples: tuple[Example, ...]

    @property
    def exact_share(self) -> float:
        return self.exact / self.held_out if self.held_out else 0.0

    @property
    def near_share(self) -> float:
        return self.near / self.held_out if self.held_out else 0.0


@dataclass(frozen=True, eq=False)
class Sketch:
    """A batch as it is compared: (D,) keys, (D, BINS) signatures, full: (D,) bool, whether there is any content."""

    keys: tuple[bytes, ...]
    signatures: Uint32
    full: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Found:
    """What one batch of training documents has in common with the held-out ones.

    exact: (place of the document, held-out number); near: (place, held-out number, alike); read: as a group's.
    """

    documents: int
    bytes: int
    read: int
    exact: list[tuple[str, int]] = field(default_factory=list)
    near: list[tuple[str, int, float]] = field(default_factory=list)


class HeldOut:
    """Held-out documents, each different one once. limit: how alike near ones are at least, from 0.3 to 1."""

    def __init__(self, batches: Iterable[Batch], limit: float) -> None:
        self.limit = limit
        self.numbers: dict[bytes, int] = {}
        self.places, self.copies, self.texts = list[str](), list[int](), list[bytes]()
        self.bytes = list[int]()
        self.documents = self.empty = self.total_bytes = 0
        kept = [np.zeros((0, 128), np.uint32)]
        for batch in batches:
            made = sketch(batch)
            fresh = list[int]()
            for row, (document, key) in enumerate(zip(batch.group.documents, made.keys, strict=True)):
                self.total_bytes += len(document.content)
                self.documents += bool(made.full[row])
                self.empty += not made.full[row]
                if not made.full[row]:
                    continue
                if key in self.numbers:
                    self.copies[self.numbers[key]] += 1
                    self.bytes[self.numbers[key]] += len(document.content)
                else:
                    self.numbers[key] = len(self.places)
                    self.places.append(document.place)
                    self.copies.append(1)
                    self.bytes.append(len(document.content))
                    self.texts.append(document.content[:200])
                    fresh.append(row)
            kept.append(made.signatures[fresh])
        self.signatures = np.concatenate(kept)
        self.bands = Bands(self.signatures)

    def compare(self, batch: Batch) -> Found:
        """What training documents have in common with these."""
        made, documents = sketch(batch), batch.group.documents
        found = Found(int(made.full.sum()), sum(len(document.content) for document in documents), batch.group.read)
        same = np.array([self.numbers.get(key, -1) for key in made.keys], dtype=np.int64)
        same[~made.full] = -1
        found.exact.extend((documents[row].place, int(same[row])) for row in np.flatnonzero(same >= 0))
        asked = np.flatnonzero(made.full)
        rows, kept = self.bands.pairs(made.signatures[asked])
        rows = asked[rows]
        alike = estimates(made.signatures[rows], self.signatures[kept])
        near = (alike >= self.limit) & (same[rows] != kept)
        for row, number, value in zip(rows[near], kept[near], alike[near], strict=True):
            found.near.append((documents[row].place, int(number), float(value)))
        return found


def sketch(batch: Batch) -> Sketch:
    hashes, home = shingles(batch.units, batch.counts, batch.width)
    return Sketch(batch.keys, signatures(hashes, home, len(batch.counts)), batch.counts > 0)


def scan(
    train: Iterable[T],
    held_out: Iterable[T],
    cut: Callable[[T], Batch],
    limit: float = 0.8,
    examples: int = 5,
    processes: int = 1,
    run: Run | None = None,
    total: int = 0,
) -> Overlap:
    """Exact and near duplicates between training and held-out documents. What is kept of the training text does not
    grow with it. cut: makes batches of what the two sides give; total: bytes that training groups have read in the end,
    for the progress."""
    kept = HeldOut(map(cut, held_out), limit)
    exact, near = dict[int, str](), dict[int, tuple[float, str]]()
    train_exact, train_near = 0, 0
    documents = size = 0
    make = partial(_comparing, kept, cut)
    with workers(make, processes) as compared, (run or Run()).meter("scan", total, "B") as meter:
        for found in compared(train):
            documents += found.documents
            size += found.bytes
            for place, number in found.exact:
                exact.setdefault(number, place)
            for place, number, alike in found.near:
                if alike > near.get(number, (0.0, ""))[0]:
                    near[number] = alike, place
            same = {place for place, _ in found.exact}
            train_exact += len(same)
            train_near += len({place for place, *_ in found.near} - same)
            meter.update(found.read)
    only_near = {number: best for number, best in near.items() if number not in exact}
    return Overlap(
        held_out=kept.documents,
        held_out_bytes=kept.total_bytes,
        train=documents,
        train_bytes=size,
        exact=sum(kept.copies[number] for number in exact),
        exact_bytes=sum(kept.bytes[number] for number in exact),
        near=sum(kept.copies[number] for number in only_near),
        near_bytes=sum(kept.bytes[number] for number in only_near),
        train_exact=train_exact,
        train_near=train_near,
        empty=kept.empty,
        limit=limit,
        examples=_examples(kept, exact, only_near, examples),
    )


def _examples(
    kept: HeldOut, exact: dict[int, str], near: dict[int, tuple[float, str]], count: int
) -> tuple[Example, ...]:
    """The first exact ones and the most alike near ones, `count` of each."""
    same = [Example(kept.places[number], exact[number], 1.0, kept.texts[number]) for number in sorted(exact)[:count]]
    order = sorted(near, key=lambda number: (-near[number][0], number))[:count]
    return (
        *same,
        *(Example(kept.places[number], near[number][1], near[number][0], kept.texts[number]) for number in order),
    )


def _comparing(kept: HeldOut, cut: Callable[[T], Batch]) -> Callable[[T], Found]:
    """The work of one process."""
    return lambda group: kept.compare(cut(group))
