"""A whole data set: listed, weighed against the disk, fetched several files at a time, written down."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from fairway.base import files
from fairway.base.clock import Stopwatch
from fairway.base.errors import BudgetError, DataError, FairwayError, RecipeError
from fairway.base.folders import locked
from fairway.base.journal import Run
from fairway.data.fetching.download import PARTS, Ended, Patience, matches, part_of, size_of, take
from fairway.data.fetching.layout import Layout
from fairway.data.fetching.places import Passing, Place, Published
from fairway.data.shardsets import RECEIPT
from fairway.data.sources.shards import open_shard
from fairway.data.tokenizer import Tokenizer

_MARGIN = 64_000_000  # bytes of the disk that are left free
_LOOK = 0.2  # seconds between two looks at the work


@dataclass(frozen=True)
class Fetched:
    """What a fetch came to. bytes: of all files; new_bytes: those that were not there when it began."""

    folder: str
    source: dict[str, str]
    files: int
    train_shards: int
    valid_shards: int
    bytes: int
    new_bytes: int
    seconds: float


class _Count:
    """Bytes, counted by several threads."""

    def __init__(self) -> None:
        self.bytes, self._lock = 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


def fetch(
    place: Place,
    layout: Layout,
    tokenizer: str,
    shards: int,
    folder: Path,
    jobs: int = 4,
    run: Run | None = None,
    patience: Patience | None = None,
) -> Fetched:
    """Fetches the tokenizer, the held-out shards and `shards` training shards into `folder`, flat, with a receipt.

    A file stands under its name only when its size and hash are as published and it is what it should be; what is
    there already is read and kept, what was cut off is taken up. Errors: DataError of the place or its files,
    BudgetError where the disk is too small, RecipeError for a wrong question.
    """
    run, patience, watch = run or Run(), patience or Patience(), Stopwatch().start()
    if jobs < 1:
        raise RecipeError(f"--jobs {jobs}: at least one file at a time is needed")
    wanted = layout.choose(_listed(place, patience, run.say), tokenizer, shards)
    free = _lock(folder)
    try:
        hashes = _present(wanted, folder, run)
        missing = [file for file in wanted if file.name not in hashes]
        new = sum(file.bytes - size_of(part_of(file, folder)) for file in missing)
        _check_disk(new, folder)
        hashes |= _take_all(place, missing, new, folder, jobs, run, patience)
        _write_receipt(folder, place, tokenizer, wanted, hashes)
        for path in (folder / PARTS).iterdir():  # parts of other revisions, of no use any more
            path.unlink()
    finally:
        free()
    total = sum(file.bytes for file in wanted)
    valid = len(wanted) - shards - 1
    seconds = round(watch.stop(), 3)
    return Fetched(str(folder), place.describe(), len(wanted), shards, valid, total, new, seconds)


def _listed(place: Place, patience: Patience, say: Callable[[str], None]) -> list[Published]:
    for failures in range(1, patience.tries + 1):
        try:
            return place.listing()
        except Passing as passing:
            pause = patience.wait(failures, passing.wait)
            if failures == patience.tries or pause > patience.most_asked:
                raise DataError(
                    f"{' '.join(place.describe().values()).strip()}: given up after {failures} tries: {passing}; "
                    "try again later, name a mirror with HF_ENDPOINT, or a local copy with --from"
                ) from passing
            say(f"fetch         {passing}; again in {pause:.0f} s ({failures} of {patience.tries} tries)")
            time.sleep(pause)
    raise AssertionError("patience has no end")


def _lock(folder: Path) -> Callable[[], None]:
    """Takes the folder for this process, and gives the way to let it go."""
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder}: is a file; name a folder with -o")
    try:
        file = locked(folder / PARTS)
    except RecipeError as error:
        in_use = "in use" in str(error)
        why = "another fetch is at work in it; wait for it" if in_use else str(error).partition(": ")[2]
        raise RecipeError(f"{folder}: {why}") from error

    def free() -> None:
        if {path.name for path in (folder / PARTS).iterdir()} <= {".lock"}:
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        file.close()

    return free


def _present(wanted: Sequence[Published], folder: Path, run: Run) -> dict[str, str]:
    """The files that are there already and are as published, with their sha256: every byte is read once more."""
    there = [file for file in wanted if (folder / file.name).is_file()]
    if not there:
        return {}
    count, found = _Count(), dict[str, str]()
    with run.meter("check", sum(file.bytes for file in there), "B") as meter:
        for file in there:
            digest = matches(folder / file.name, file, count.add)
            meter.update(count.bytes)
            if digest and _fault(folder / file.name, file) is None:
                found[file.name] = digest
    return found


def _check_disk(needed: int, folder: Path) -> None:
    """BudgetError where what is still to come does not fit."""
    free = shutil.disk_usage(folder).free
    if needed and needed + _MARGIN > free:
        raise BudgetError(
            f"{folder}: {needed / 1e9:,.2f} GB are to come, {free / 1e9:,.2f} GB are free on this disk; "
            "free some space, ask for fewer --shards, or name another folder with -o"
        )


def _take_all(
    place: Place, missing: Sequence[Published], new: int, folder: Path, jobs: int, run: Run, patience: Patience
) -> dict[str, str]:
    """Fetches the files, `jobs` at a time. The first error ends the others, whose parts stay for the next call."""
    if not missing:
        return {}
    end, total, count = threading.Event(), sum(file.bytes for file in missing), _Count()
    begun = total - new
    with run.meter("fetch", total, "B", begun) as meter, ThreadPoolExecutor(jobs, "fetch") as pool:
        work = {
            file.name: pool.submit(take, place, file, folder, _check_content, patience, count.add, end)
            for file in missing
        }
        try:
            _watch(list(work.values()), lambda: meter.update(begun + count.bytes))
        finally:  # an interruption, too: without this the pool would wait for hours of work
            end.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: future.result() for name, future in work.items()}


def _watch(work: Sequence[Future[str]], show: Callable[[], None]) -> None:
    """Waits for all, showing progress; raises the first error that is one."""
    waiting = set(work)
    while waiting:
        done, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_EXCEPTION)
        show()
        for future in done:
            error = future.exception()
            if error is not None and not isinstance(error, Ended):
                raise error


def _check_content(part: Path, file: Published) -> None:
    """DataError where a file that came as published is no shard or no tokenizer."""
    if (fault := _fault(part, file)) is not None:
        why = str(fault).removeprefix(f"{part}: ").removeprefix(f"{file.name}: ").partition(";")[0]
        raise DataError(f"{file.path}: came as published, but {why}; look at the repository and the layout") from fault


def _fault(path: Path, file: Published) -> FairwayError | None:
    """What keeps a file from being the shard or the tokenizer that its name promises."""
    try:
        if file.name.endswith(".bin"):
            open_shard(path)
        elif file.name.endswith(".model"):
            Tokenizer.from_bytes(files.read(path), file.name)
    except FairwayError as error:
        return error
    return None


def _write_receipt(
    folder: Path, place: Place, tokenizer: str, wanted: Sequence[Published], hashes: dict[str, str]
) -> None:
    rows = [{"name": file.name, "path": file.path, "bytes": file.bytes, "sha256": hashes[file.name]} for file in wanted]
    table = {"source": place.describe(), "tokenizer": tokenizer, "files": rows}
    files.write(folder / RECEIPT, json.dumps(table, indent=1) + "\n")
