"""A source becomes shards: read as a stream, encoded on all cores, written in order."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.base.progress import Meter
from fairway.data.building.encoding import Encoder
from fairway.data.building.folder import FORMAT, Folder
from fairway.data.building.listing import File, files_of, sha256_of, shown
from fairway.data.building.processes import cores, workers
from fairway.data.building.reading import BLOCK, Block, Digest, blocks, segments_of
from fairway.data.building.spec import BuildSpec
from fairway.data.building.work import Encoded, encode_block
from fairway.data.tokenizer import Tokenizer


def build(
    sources: Sequence[str],
    folder: Path,
    tokenizer: Tokenizer,
    spec: BuildSpec,
    processes: int = 0,
    run: Run | None = None,
    code: str = "",
) -> dict[str, Any]:
    """The shards of `sources` in `folder`; returns the manifest. processes: 0 = one for each core; code: the version of
    this code, for the manifest.

    The same source, tokenizer and spec give the same bytes whatever the number of processes, and however often the
    build was killed and called again; a source or a setting that changed since is refused (DataError, RecipeError).
    """
    run, listed = run or Run(), files_of(sources, spec.kind)
    mine, by_files = share_of_files(listed, spec)
    settings = {
        **asdict(spec),
        "format": FORMAT,
        "block_bytes": BLOCK,
        "listing_sha256": sha256_of(listed),
        "tokenizer_sha256": tokenizer.sha256,
    }
    _apart(folder, listed)
    make = partial(_work, tokenizer.model, tokenizer.name, spec, by_files)
    with workers(make, processes or cores()) as encoded_in_order:  # started before anything else is at work here
        opened = Folder(folder, spec, settings)
        try:
            if opened.done is not None:
                run.say(f"{folder}: built already, from files of these names and sizes")
                return opened.done
            digest = Digest()
            found = _own_blocks(mine, by_files, spec, opened, digest)
            total = sum(file.bytes for file in mine)
            with run.meter("build", total, "B", opened.read) if total else nullcontext(Telling(run)) as meter:
                _collect(encoded_in_order(found), opened, meter)
            if not opened.counts.documents and spec.parts == 1:
                raise DataError(f"{shown(sources[0])}: no document in it; name a source that holds some")
            files.write(folder / Path(tokenizer.name).name, tokenizer.model)
            alone, total = digest.end()
            source = {
                "files": len(listed),
                "files_read": digest.files,
                "bytes": digest.bytes,
                "sha256": alone if len(listed) == 1 else f"{total:064x}",
                "by_files": by_files,
            }
            return opened.finish(source, described(tokenizer), code)
        finally:
            opened.close()


class Telling:
    """A meter of standard input, whose end nobody knows: a line every ten seconds says how much came."""

    def __init__(self, run: Run) -> None:
        self.run, self.begun = run, time.monotonic()
        self.last = self.begun

    def update(self, done: float, **shown: float) -> None:
        if (now := time.monotonic()) - self.last > 10:
            self.last = now
            facts = ", ".join(f"{value:,.0f} {name}" for name, value in shown.items())
            self.run.say(f"build        {facts}, {now - self.begun:.0f} s")


def described(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says of a tokenizer."""
    return {
        "sha256": tokenizer.sha256,
        "pieces": tokenizer.size,
        "bos": tokenizer.bos,
        "file": Path(tokenizer.name).name,
        "sentencepiece": sentencepiece.__version__,
    }


def share_of_files(listed: Sequence[File], spec: BuildSpec) -> tuple[list[File], bool]:
    """(the files that this part reads, whether parts divide the files): file n belongs to part n mod parts + 1 where
    there is one for each part at least; else every part reads all, and block n belongs to part n mod parts + 1."""
    by_files = 1 < spec.parts <= len(listed)
    return [file for file in listed if not by_files or file.number % spec.parts == spec.part - 1], by_files


def _work(model: bytes, name: str, spec: BuildSpec, by_files: bool) -> Callable[[Block], Encoded]:
    encoder = Encoder(Tokenizer.from_bytes(model, name))
    return lambda block: encode_block(block, encoder, spec, by_files)


def _own_blocks(
    mine: Sequence[File], by_files: bool, spec: BuildSpec, opened: Folder, digest: Digest
) -> Iterator[Block]:
    """The blocks that are this part's and not yet encoded; what was is read through and compared by its hash."""
    segments, number = segments_of(mine, spec.separator, spec.text_key, spec.longest), -1
    for block in blocks(segments, mine, digest):
        number = block.number
        if number == opened.next - 1 and block.digest != opened.digest:
            raise _changed(opened.path)
        if number >= opened.next and (by_files or number % spec.parts == spec.part - 1):
            yield block
    if number < opened.next - 1:
        raise _changed(opened.path)


def _changed(folder: Path) -> DataError:
    return DataError(f"{folder}: the source has changed since the build was begun; name another folder with -o")


def _collect(encoded: Iterator[Encoded], opened: Folder, meter: Meter) -> None:
    try:
        for one in encoded:
            opened.add(one)
            meter.update(one.read, documents=opened.counts.documents, MB=opened.counts.bytes / 1e6)
    finally:  # an error, or Ctrl-C: what was done before it need not be done again
        opened.settle()


def _apart(folder: Path, listed: Sequence[File]) -> None:
    place = folder.resolve()
    for file in listed:
        if file.path is not None and place in file.path.resolve().parents:
            raise RecipeError(f"{folder}: holds {shown(file.name)} of the source; name a folder of its own with -o")
