"""The scan: held-out documents are kept as keys and signatures, training documents stream past them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from fairway.base.journal import Run
from fairway.data.overlap.documents import Batch, Document, batched
from fairway.data.overlap.minhash import Bands, Uint32, estimates, shingles, signatures

Cut = Callable[[Sequence[Document]], Batch]  # of_text or of_tokens


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

    exact: held-out documents that stand in the training text too; near: others, at least `limit` alike; train_exact and
    train_near: training documents like that; empty: held-out documents without content, left out.
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

    exact: (document of the batch, held-out number); near: (document, held-out number, alike).
    """

    documents: int
    bytes: int
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
            for row, (document, key) in enumerate(zip(batch.documents, made.keys, strict=True)):
                self.documents += 1
                self.total_bytes += len(document.content)
                if not made.full[row]:
                    self.empty += 1
                elif key in self.numbers:
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
        made = sketch(batch)
        found = Found(len(batch.documents), batch.bytes)
        same = np.array([self.numbers.get(key, -1) for key in made.keys], dtype=np.int64)
        same[~made.full] = -1
        found.exact.extend((batch.documents[row].place, int(same[row])) for row in np.flatnonzero(same >= 0))
        asked = np.flatnonzero(made.full)
        rows, kept = self.bands.pairs(made.signatures[asked])
        rows = asked[rows]
        alike = estimates(made.signatures[rows], self.signatures[kept])
        near = (alike >= self.limit) & (same[rows] != kept)
        for row, number, value in zip(rows[near], kept[near], alike[near], strict=True):
            found.near.append((batch.documents[row].place, int(number), float(value)))
        return found


def sketch(batch: Batch) -> Sketch:
    hashes, home = shingles(batch.units, batch.counts, batch.width)
    return Sketch(batch.keys, signatures(hashes, home, len(batch.documents)), batch.counts > 0)


def scan(
    train: Iterable[Document],
    held_out: Iterable[Document],
    cut: Cut,
    limit: float = 0.8,
    examples: int = 5,
    jobs: int = 1,
    run: Run | None = None,
    total: int = 0,
) -> Overlap:
    """Exact and near duplicates between training and held-out documents. What is kept of the training text does not
    grow with it. total: bytes of training documents, for the progress; jobs: processes."""
    kept = HeldOut(map(cut, batched(held_out)), limit)
    exact, near = dict[int, str](), dict[int, tuple[float, str]]()
    train_exact, train_near = 0, 0
    documents = read = 0
    with (run or Run()).meter("scan", total, "B") as meter:
        for found in _compared(batched(train), kept, cut, jobs):
            documents += found.documents
            read += found.bytes
            for place, number in found.exact:
                exact.setdefault(number, place)
            for place, number, alike in found.near:
                if alike > near.get(number, (0.0, ""))[0]:
                    near[number] = alike, place
            same = {place for place, _ in found.exact}
            train_exact += len(same)
            train_near += len({place for place, *_ in found.near} - same)
            meter.update(read)
    only_near = {number: best for number, best in near.items() if number not in exact}
    return Overlap(
        held_out=kept.documents,
        held_out_bytes=kept.total_bytes,
        train=documents,
        train_bytes=read,
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


def _compared(groups: Iterator[list[Document]], kept: HeldOut, cut: Cut, jobs: int) -> Iterator[Found]:
    """What each group has in common with the held-out documents, in order, in this process or in several."""
    if jobs <= 1:
        for group in groups:
            yield kept.compare(cut(group))
        return
    context = get_context("spawn")  # a fork would copy torch's threads in whatever state they are
    with ProcessPoolExecutor(jobs, context, initializer=_take_up, initargs=(kept, cut)) as pool:
        pending = list[Future[Found]]()
        for group in groups:
            pending.append(pool.submit(_compare, group))
            if len(pending) > 2 * jobs:  # no more of the training text is held than is worked on
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


_here: list[tuple[HeldOut, Cut]] = []


def _take_up(kept: HeldOut, cut: Cut) -> None:
    _here[:] = [(kept, cut)]


def _compare(group: list[Document]) -> Found:
    kept, cut = _here[0]
    return kept.compare(cut(group))
