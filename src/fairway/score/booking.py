"""What a score in exact mode leaves behind for those who check it: chunk by chunk, the hash of the state that the
chunk was scored with.

A chunk can then be proven by itself: from the state before it, the step to it is taken again, and it is decoded.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fairway.base import files
from fairway.base.errors import DataError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build
from fairway.score.ledger import Ledger
from fairway.score.predictor import Adapter
from fairway.score.state import tensors_hash
from fairway.score.stream import Stream, Unit

BOOKED, SNAPSHOTS = "booked.json", "snapshots"


def wanted(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe (its plain table) has its score booked chunk by chunk."""
    return bool(recipe["score"]["exact"]) and recipe["score"]["result"] == "adapted"


@dataclass(frozen=True)
class Booked:
    """The books of an adapted score in exact mode.

    states: a hash for the start of every chunk; nats: what every chunk cost, as float.hex(); snapshots: the chunks
    whose states are kept beside it.
    """

    artifact_sha256: str
    text_sha256: str
    chunk: int
    states: tuple[str, ...]
    nats: tuple[str, ...]
    snapshots: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Of all that was booked: what chunks are drawn from, with a nonce."""
        return hashlib.sha256(json.dumps({**self.__dict__, "snapshots": None}, sort_keys=True).encode()).hexdigest()


class Booking:
    """Books a score as it is made; the books appear when it is complete."""

    def __init__(
        self, run: Run, ledger: Ledger, stream: Stream, every: int, text_sha256: str, artifact_sha256: str
    ) -> None:
        self.run, self.ledger, self.stream, self.every = run, ledger, stream, every
        self.text_sha256, self.artifact_sha256 = text_sha256, artifact_sha256
        self.states: list[str] = []
        self.nats: list[str] = []
        self.snapshots: list[int] = []

    def begin_with(self, adapter: Adapter) -> None:
        """Before the first chunk: its state, and what the snapshots will take."""
        self.adapter = adapter
        if self.run.writes:
            self.run.path(BOOKED).unlink(missing_ok=True)
            for stale in self.run.path(SNAPSHOTS).glob("*.safetensors"):
                stale.unlink()
        weights = sum(tensor.numel() * tensor.element_size() for tensor in adapter.state().values())
        kept = (len(self.stream) - 1) // self.every if self.every else 0
        if kept:
            need = 3 * weights * kept
            self.run.say(f"snapshots     {kept} of the adapted state, {need / 1e6:,.0f} MB in {self.run.folder}")
        self.states.append(tensors_hash(adapter.state()))

    def __call__(self, unit: Unit) -> None:
        """unit: this rank's share of a chunk that was paid and learned from."""
        price = self.ledger.price(unit.windows.positions).sum()
        mine = torch.tensor([price], dtype=torch.float64, device=self.run.ranks.device)
        self.nats.append(float(self.run.ranks.sum_(mine).item()).hex())
        following = unit.index + 1
        if following == len(self.stream):
            return
        state = self.adapter.state()
        self.states.append(tensors_hash(state))
        if self.every and following % self.every == 0:
            self.snapshots.append(following)
            if self.run.writes:
                write_state(snapshot_path(self.run.path(SNAPSHOTS), following), state)

    def close(self) -> None:
        """The score stands: its books appear. Their hash goes into the journal: who gives a nonce should know it first,
        or nonces could be tried until the draw pleases."""
        booked = Booked(
            self.artifact_sha256,
            self.text_sha256,
            self.stream.chunk,
            tuple(self.states),
            tuple(self.nats),
            tuple(self.snapshots),
        )
        if self.run.writes:
            files.write(self.run.path(BOOKED), json.dumps(booked.__dict__) + "\n")
        self.run.fact("booked", sha256=booked.sha256, chunks=len(booked.nats))
        self.run.say(f"books         {len(booked.nats)} chunks, sha256 {booked.sha256}")


def read_booked(folder: Path) -> Booked:
    """The books in a run folder; RecipeError where the score was not made in exact mode."""
    path = folder / BOOKED
    if not path.exists():
        raise RecipeError(
            f"{folder}: no books of chunks ({BOOKED} is missing); --chunks needs an adapted score made in exact mode: "
            'run with score.exact = true and score.result = "adapted", or prove a slice'
        )
    try:
        return build(Booked, json.loads(files.read(path)))
    except (ValueError, RecipeError) as error:
        raise DataError(f"{path}: damaged ({error}); score the run again") from error


def snapshot_path(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:06d}.safetensors"


def write_state(path: Path, state: dict[str, torch.Tensor]) -> None:
    """A state's tensors, bit for bit."""
    files.write(
        path, safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in state.items()})
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """What `write_state` wrote; DataError where it is damaged."""
    content = files.read(path)
    try:
        return dict(safetensors.torch.load(content))
    except Exception as error:
        raise DataError(f"{path}: damaged ({error}); score the run again") from error
