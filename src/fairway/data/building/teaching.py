"""A tokenizer learned from a sample of a source's training documents, which are read once, as a stream.

The sample is spread evenly over the text, though nobody knows beforehand how long it is: stretches of documents are
kept, and whenever they are more than twice what was asked for, every second one is let go and the next are taken half
as often. What is held out (by number or by hash, as `build` chooses) never teaches.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.data import learning
from fairway.data.building.listing import files_of, shown
from fairway.data.building.reading import Digest, Segment, blocks, segments_of
from fairway.data.building.spec import BuildSpec
from fairway.data.building.work import originals
from fairway.data.splits import key_of, share_of
from fairway.data.tokenizer import TokenizerSpec

STRETCH = 1 << 16  # bytes of a document that are kept or let go together


@dataclass(frozen=True)
class Taught:
    """A model, and what it was learned from. sample_documents: of which a part at least is in the sample."""

    model: bytes
    source_sha256: str
    train_documents: int
    train_bytes: int
    held_out_documents: int
    sample_documents: int
    sample_bytes: int


class Sample:
    """Stretches of a stream, evenly spread: between `wanted` and twice as many bytes, or all there were."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.every, self.seen, self.held = wanted, 1, 0, 0
        self.kept = list[tuple[int, bytes]]()  # (number of its document, the stretch)

    def add(self, number: int, document: bytes) -> None:
        for start in range(0, len(document), STRETCH):
            if self.seen % self.every == 0:
                self.kept.append((number, document[start : start + STRETCH]))
                self.held += len(self.kept[-1][1])
            self.seen += 1
            while self.held > 2 * self.wanted and len(self.kept) > 1:
                self.kept, self.every = self.kept[::2], 2 * self.every
                self.held = sum(len(stretch) for _, stretch in self.kept)


def teach(sources: Sequence[str], tokenizer: TokenizerSpec, spec: BuildSpec, run: Run | None = None) -> Taught:
    """The model of a tokenizer spec, learned from training documents of `sources` alone. DataError where there are
    none, or too few for so many pieces."""
    run, files = run or Run(), files_of(sources, spec.kind)
    sample, digest, held_out, trained, size = Sample(tokenizer.sample_bytes), Digest(), set[bytes](), 0, 0
    numbers, held_number = 0, 0
    with run.meter("read", sum(file.bytes for file in files), "B") as meter:
        for block in blocks(segments_of(files, spec.separator, spec.text_key, spec.longest), files, digest):
            for document in _documents(block.segments, spec):
                number, numbers = numbers, numbers + 1
                if _held_out(number, document, spec, held_out):
                    held_number += 1
                    continue
                sample.add(number, document)
                trained, size = trained + 1, size + len(document)
            meter.update(block.read, documents=numbers)
    if not trained:
        raise DataError(f"{shown(sources[0])}: no training document in it; name more text, or hold out less")
    alone, total = digest.end()
    run.say(f"learning {tokenizer.vocab:,} pieces")
    stretches = [stretch for _, stretch in sample.kept]
    return Taught(
        learning.train(stretches, tokenizer),
        alone if len(files) == 1 else f"{total:064x}",
        trained,
        size,
        held_number,
        len({number for number, _ in sample.kept}),
        sum(len(text.encode()) for text in learning._sample(stretches, tokenizer.sample_bytes)),
    )


def beginning(source: str, separator: str, most_bytes: int) -> list[bytes]:
    """The first documents of a text, until `most_bytes` are reached. DataError where there is none."""
    spec, found, held = BuildSpec(separator=separator), list[bytes](), 0
    for segment in segments_of(files_of([source]), spec.separator, spec.text_key, spec.longest):
        for document in _documents([segment], spec):
            if held >= most_bytes:
                return found
            found.append(document)
            held += len(document)
    if not found:
        raise DataError(f"{shown(source)}: no document in it; name a text that holds some")
    return found


def _documents(segments: Sequence[Segment], spec: BuildSpec) -> Iterator[bytes]:
    for segment in segments:
        yield from (document for _, document in originals(segment, spec) if document)


def _held_out(number: int, document: bytes, spec: BuildSpec, held_out: set[bytes]) -> bool:
    """As the build chooses; and a document that stands among the first ones again is held out too."""
    if spec.valid_documents is None:
        return share_of(document) < spec.valid_fraction
    key = key_of(document)[:8]
    if number < spec.valid_documents:
        held_out.add(key)
    return key in held_out
