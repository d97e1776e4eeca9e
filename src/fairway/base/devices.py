"""Devices and seeds. CPU: float32, eager. CUDA: bf16 activations over float32 masters, compiled."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fairway.base.errors import RecipeError

_Place: TypeAlias = torch.device  # by another name: the class below has a field called torch
_Type: TypeAlias = torch.dtype


@dataclass(frozen=True)
class Device:
    """Where the numbers are computed, and how."""

    torch: _Place
    compute: _Type  # of activations; parameters stay float32
    compile: bool

    def describe(self) -> dict[str, object]:
        """Facts for the journal."""
        name = torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else platform.processor()
        return {
            "device": str(self.torch),
            "processor": name or platform.machine(),
            "compute": str(self.compute).removeprefix("torch."),
            "compile": self.compile,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "attention": "torch SDPA",
        }


def choose(name: str = "auto", local_rank: int = 0) -> Device:
    """The device of a name: auto (CUDA where there is one), cpu or cuda."""
    if name not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"--device {name}: choices: auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RecipeError("--device cuda: this machine has no CUDA device that torch can see; use --device cpu")
    if name == "cpu" or not available:
        return Device(torch.device("cpu"), torch.float32, compile=False)
    torch.set_float32_matmul_precision("high")  # TF32: what stays in float32 beside the bf16 activations
    return Device(torch.device("cuda", local_rank), torch.bfloat16, compile=True)


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for every use of chance, so that one more draw in one place moves nothing elsewhere."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:7], "little")


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by `seed_for`."""
    return torch.Generator().manual_seed(seed_for(seed, purpose))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """This many threads for torch inside the block (0: as it is): sums over other numbers of threads differ in the last
    bit."""
    before = torch.get_num_threads()
    if count and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
