"""Published data sets, fetched."""

import tomllib
from dataclasses import asdict, replace
from pathlib import Path

from fairway.base import recipes
from fairway.base.errors import DataError, RecipeError
from fairway.base.files import read
from fairway.base.journal import Run
from fairway.data.fetching import Hub, Layout, Mirror, fetch
from fairway.data.shardsets import RECEIPT
from fairway.verbs.bar import bar
from fairway.verbs.printing import answer


def fetch_data(
    name: str,
    tokenizer: str,
    shards: int,
    out: Path | None,
    source: Path | None,
    repository: str,
    revision: str,
    jobs: int,
    as_json: bool,
) -> None:
    layout = _layout(name)
    if source is not None and (repository or revision):
        raise RecipeError("--from: a local folder has no --repository and no --revision; leave them out")
    layout = replace(layout, repository=repository or layout.repository, revision=revision or layout.revision)
    folder = out or Path("data") / f"{layout.name}_{tokenizer}"
    place = Hub(layout) if source is None else Mirror(source, RECEIPT)
    run = Run(quiet=as_json, bar=bar)
    found = fetch(place, layout, tokenizer, shards, folder, jobs, run)
    line = (
        f"{folder}: {found.train_shards} training and {found.valid_shards} held-out shard(s) and their tokenizer, "
        f"{found.bytes:,} bytes, {found.new_bytes:,} of them new; {found.seconds:.1f} s; "
        f"next: fairway data stats {folder}"
    )
    answer(asdict(found), line, as_json)


def _layout(name: str) -> Layout:
    """The challenge's layout by its name, or the one that a .toml file describes."""
    if name == Layout().name:
        return Layout()
    path = Path(name)
    if path.suffix != ".toml":
        raise RecipeError(f"{name}: no such data set; choices: {Layout().name}, or a .toml file that describes one")
    try:
        table = tomllib.loads(read(path).decode())
    except DataError as error:
        raise RecipeError(str(error)) from error
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from error
    table.setdefault("name", path.stem)
    return recipes.check(Layout, table)
