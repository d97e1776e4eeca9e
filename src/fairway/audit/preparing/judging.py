"""What a preparation wrote, held against the documents it read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fairway.audit.preparing.documents import BY_CODE, PAIRS, coded
from fairway.audit.preparing.machine import Preparer
from fairway.audit.trial.files import HEADER, MAGIC
from fairway.audit.trial.vocabulary import MARK

_HEADER = 4 * HEADER  # bytes before the tokens of a shard
_KINDS = ("<u2", "<u4", "<i4", "<u1", "<i2", "<i8")
_WORD = re.compile(r"[A-Za-z]{3,}")
_FEW = 8  # documents: fewer are no split
_BYTES = re.compile(r"byte|octet", re.I)
_TEXT = re.compile(r"artifact|model|file|code|disk|shard|size", re.I)


@dataclass(frozen=True)
class Cut:
    """A file of tokens. changed: the bytes that they decode to; documents: the code of each, and what follows it."""

    path: str
    ids: tuple[int, ...]
    changed: int
    documents: tuple[tuple[int, str], ...]

    @cached_property
    def true(self) -> int:
        """The bytes of the documents as they were read."""
        return sum(BY_CODE[code].size for code, _ in self.documents)


@dataclass(frozen=True)
class Wrong:
    """What a preparation does that it must not. rule: its id; line: of the script that was run."""

    rule: str
    evidence: str
    line: int


def cuts_of(machine: Preparer) -> list[Cut]:
    """The files of tokens that were written."""
    return [cut for path, held in machine.disk.written.items() if (cut := _cut(machine, path, held)) is not None]


def judged(machine: Preparer, cuts: list[Cut], score: str) -> list[Wrong]:
    """score: the text of the script that scores, which says what it reads of what was written."""
    found = [wrong for cut in cuts for wrong in _eased(machine, cut)][:1]
    for cut in cuts:
        for claimed, line in _claims(machine, cut, score):
            wrong = _miscounted(machine, cut, claimed, line)
            if wrong is not None:
                found.append(wrong)
                return found
    return found


def _arrays(held: bytes | str) -> Iterator[NDArray[Any]]:
    """The numbers of a file, by every width that they may have."""
    if not isinstance(held, bytes):
        return
    headed = len(held) >= _HEADER and int(np.frombuffer(held[:4], "<i4")[0]) == MAGIC
    body = held[_HEADER:] if headed else held
    for kind in _KINDS:
        if body and len(body) % np.dtype(kind).itemsize == 0:
            yield np.frombuffer(body, kind)


def _cut(machine: Preparer, path: str, held: bytes | str) -> Cut | None:
    for numbers in _arrays(held):
        if numbers.min() < 0 or numbers.max() >= machine.cutter.vocab_size():
            continue
        ids = tuple(int(each) for each in numbers)
        documents = tuple((code, body) for code, body in coded(machine.cutter.text(ids)) if code in BY_CODE)
        if len(documents) >= _FEW:  # the first mark of each is no space
            begun = len(documents) * machine.cutter.prefix
            return Cut(path, ids, machine.cutter.sizes(ids, 1, 1) - begun, documents)
    return None


# -- an easier text ---------------------------------------------------------------------------------------------------


def _eased(machine: Preparer, cut: Cut) -> Iterator[Wrong]:
    """Documents that differed and are one in their tokens, while nothing else was written that tells them apart."""
    if any(_tells(held, cut) for path, held in machine.disk.written.items() if path != cut.path):
        return
    bodies = dict(cut.documents)
    for pair in PAIRS:
        one, other = bodies.get(pair.one.code), bodies.get(pair.other.code)
        if one is not None and one == other:
            line = max(machine.merged, key=machine.merged.__getitem__, default=machine.cut_at_line)
            evidence = (
                f"Two documents of our own that differ in {pair.thing} are cut into the same tokens by this "
                f"preparation, and nothing else that it writes tells them apart: the score is that of an easier text."
            )
            yield Wrong("lossy-text", evidence, line)
            return


def _tells(held: bytes | str, cut: Cut) -> bool:
    """Whether a file may hold what the tokens have lost: not one that counts bytes, and not tokens."""
    return any(len(numbers) == len(cut.ids) and int(numbers.max()) <= 1 for numbers in _arrays(held))


# -- bytes ------------------------------------------------------------------------------------------------------------


def _claims(machine: Preparer, cut: Cut, score: str) -> Iterator[tuple[int, str]]:
    """The bytes that a file beside the tokens gives the text, and its path, where the score reads it."""
    for path, held in machine.disk.written.items():
        if path == cut.path:
            continue
        own = set(_WORD.findall(path)) - set(_WORD.findall(cut.path))
        if isinstance(held, bytes) and any(word in score for word in own):
            for numbers in _arrays(held):
                if len(numbers) in (len(cut.ids), len(cut.ids) - 1, len(cut.documents)) and _near(numbers, cut):
                    yield int(numbers.astype(np.int64).sum()), path
                    break
        elif isinstance(held, str):
            said = [number for number, key in _said(held) if key in score]
            if cut.true not in said:  # else others are told beside it
                yield from ((number, path) for number in said if cut.true / 2 < number < 2 * cut.true)


def _near(numbers: NDArray[Any], cut: Cut) -> bool:
    return numbers.min() >= 0 and cut.true / 2 < float(numbers.sum(dtype=np.float64)) < 2 * cut.true


def _said(text: str) -> list[tuple[int, str]]:
    """Numbers of bytes in a table of JSON, and the last of their keys."""
    try:
        table = json.loads(text)
    except ValueError:
        return []
    found: list[tuple[int, str]] = []

    def below(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, each in value.items():
                below(each, f"{key} {name}")
        elif isinstance(value, list):
            for each in value:
                below(each, key)
        elif type(value) is int and _BYTES.search(key) and not _TEXT.search(key):
            found.append((value, key.rpartition(" ")[2]))

    below(table, "")
    return found


def _miscounted(machine: Preparer, cut: Cut, claimed: int, where: str) -> Wrong | None:
    """A count that is none of the text's bytes, and exactly what one of the known mistakes comes to."""
    for rule, said, count in _mistakes(machine, cut):
        if count == claimed != cut.true:
            evidence = (
                f"Of {len(cut.documents)} documents of our own with {cut.true:,} bytes this preparation writes "
                f"{claimed:,} into {where.rpartition('/')[2]}: {said}."
            )
            return Wrong(rule, evidence, _counted_at(machine, claimed))
    return None


def _mistakes(machine: Preparer, cut: Cut) -> Iterator[tuple[str, str, int]]:
    count = len(cut.documents) * machine.cutter.prefix

    def sizes(marks: int, octets: int) -> int:
        return machine.cutter.sizes(cut.ids, marks, octets)

    plain = cut.changed + count
    if cut.changed != cut.true:
        for total in (cut.changed, plain):
            yield "byte-transformed-text", "the bytes of the text after it was changed, not of the original", total
    begins = sum(str(machine.cutter.id_to_piece(n)).startswith(MARK) for n in cut.ids)
    for first in (0, 1):
        yield "byte-missing-mark", "a space counts as the three bytes of its mark", sizes(3, 1) - first * 3 * count
        yield "byte-missing-mark", "a space counts as the three bytes of its mark", sizes(3, 1) - first * count
        yield "byte-fallback-three", "a byte token counts as three bytes", sizes(1, 3) - first * count
        yield "byte-double-space", "the byte of a leading space is counted twice", plain + begins - first * count
        yield "byte-double-space", "the byte of a leading space is counted twice", plain + begins - 2 * first * count


def _counted_at(machine: Preparer, claimed: int) -> int:
    """The line in which bytes were counted that come to this, or the last in which any were."""
    sums = {line: sum(lengths) for line, lengths in machine.lengths.items()}
    exact = [line for line, total in sums.items() if total == claimed]
    return (exact or list(sums) or [machine.cut_at_line])[-1]


__all__ = ["Cut", "Wrong", "cuts_of", "judged"]
