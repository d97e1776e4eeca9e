"""What a trial works out of numbers, held against the libraries themselves: each expression is evaluated by numpy,
torch or Python, and by the trial. Unknown is no answer here."""

from __future__ import annotations

import ast
import functools
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from fairway.audit.reading.script import Script
from fairway.audit.settings import Settings
from fairway.audit.trial.arrays import Array
from fairway.audit.trial.machine import Machine, over
from fairway.audit.trial.text import SHORT
from fairway.audit.trial.values import Unknown
from tests.audit.test_trial import HEAD

GIVEN = """
q = np.arange(12).reshape(3, 4)
t = torch.arange(12).reshape(3, 4)
f = np.linspace(0.1, 0.9, 12).reshape(3, 4)
i = np.array([3, 1, 2, 1, 0, 2, 2])
j = torch.tensor([3, 1, 2, 1, 0, 2, 2])
b = i > 1
c = j > 1
u = np.full(6, 0x9E3779B97F4A7C15, dtype=np.uint64)
"""

NUMPY = """
np.maximum.accumulate(np.where(b, np.arange(7), 0))
np.minimum.accumulate(i)
np.add.accumulate(q, axis=1)
np.add.reduce(q)
np.maximum.reduce(q, axis=1)
np.logical_or.reduce(q > 5)
np.bitwise_xor.reduce(i)
np.logaddexp.reduce(f, axis=1)
np.add.reduceat(i, [0, 2, 5])
np.cumprod(u)
np.cumsum((i.astype(np.uint64) + np.uint64(1)) * u[:1])
u * np.uint64(31) ^ (u >> np.uint64(29))
np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
np.repeat(i, 2)
np.repeat(i, i)
np.split(i, [2, 4])
np.array_split(i, 3)
np.pad(i, 1)
np.pad(i, (2, 0), constant_values=-1)
np.pad(q, ((0, 1), (2, 0)))
np.round(f, 1)
np.rint(f)
np.diff(i, append=9)
np.diff(i, prepend=0)
np.percentile(f, 50)
np.quantile(f, 0.25)
np.average(f, weights=f)
np.ptp(i)
np.argwhere(b)
np.vstack([i, i])
np.vstack([q, q])
np.column_stack([i, i])
np.power(f, 2)
np.mod(i, 2)
np.divmod(i, 2)
np.dot(f[0], f[1])
np.matmul(f, f.T)
np.inner(f[0], f[1])
np.compress(b, i)
np.extract(b, i)
np.delete(i, 0)
np.delete(i, [1, 2])
np.insert(i, 0, 5)
np.take(q, [0, 5])
np.take(q, 1, axis=0)
np.eye(3)
np.frombuffer(b"\\x01\\x02\\x03\\x04", dtype=np.uint16)
np.frombuffer(b"\\x01\\x02\\x03\\x04", dtype=np.uint8, count=2, offset=1)
np.histogram(i, bins=4)[0]
np.interp(1.5, [0, 1, 2], [0, 10, 20])
np.isclose(f, f)
np.packbits(b)
np.iinfo(np.int64).max
np.finfo(np.float32).eps
np.meshgrid(np.arange(2), np.arange(3))[0]
np.atleast_1d(5)
np.median(f)
np.std(f)
np.e
np.transpose(q, (1, 0))
np.unique(i, return_index=True, return_inverse=True, return_counts=True)
np.searchsorted(np.sort(i), [1, 2], side="right")
np.bincount(i, weights=i.astype(float))
np.lexsort((i, np.arange(7)))
np.nonzero(b)[0]
np.cumsum(i, out=np.zeros(7, dtype=np.int64))
"""

TORCH = """
torch.searchsorted(torch.sort(j)[0], torch.tensor([1, 2]), right=True)
torch.unique_consecutive(j)
torch.unique_consecutive(j, return_inverse=True, return_counts=True)
j.where(c, torch.tensor(0))
torch.where(c, j, -1)
torch.vstack([j, j])
torch.tensor_split(j, 3)
torch.tensor_split(j, [2, 5])
torch.split(j, [3, 4])
torch.chunk(j, 3)
torch.round(torch.from_numpy(f), decimals=1)
torch.div(j, 2, rounding_mode="floor")
torch.div(j - 3, 2, rounding_mode="trunc")
torch.fmod(j, 2)
torch.dot(j, j)
t.max(dim=-1)[0]
t.max(dim=-1).values
t.max(dim=1, keepdim=True).indices
t.min(dim=0)[1]
torch.take(t, torch.tensor([0, 5]))
t.transpose(0, 1)
t.transpose(-2, -1)
t[None].transpose(1, 2)
t.permute(1, 0)
t.unfold(1, 2, 1)
t.unfold(1, 2, 2)
t.unfold(0, 2, 1)
j.repeat(2)
torch.repeat_interleave(j, j)
torch.bucketize(j, torch.tensor([1, 2]))
torch.cummax(j, 0)[0]
torch.iinfo(torch.int64).max
torch.nn.functional.pad(j, (2, 0), value=-1)
torch.add(j, 1, out=torch.zeros(7, dtype=torch.int64))
"""

PYTHON = """
pow(2, 10)
pow(3, -1, 7)
math.prod([2, 3])
math.isqrt(17)
math.hypot(3, 4)
bytes([65, 66])
bytes(3)
list(bytearray(b"ab"))
hash((1, 2)) == hash((1, 2))
hash((1, 2)) == hash((2, 1))
list(filter(None, [0, 1]))
list(filter(lambda n: n > 1, [1, 2]))
list(itertools.pairwise([1, 2, 3]))
functools.reduce(lambda a, n: a + n, [1, 2, 3])
"""

EXPRESSIONS = [line for block in (NUMPY, TORCH, PYTHON) for line in block.strip().split("\n")]


@functools.cache
def answers(*expressions: str) -> dict[int, Any]:
    """What the trial makes of each."""
    asked = "".join(f"keep({n}, {each})\n" for n, each in enumerate(expressions))
    text = f"{HEAD}import functools, itertools, math\ndef keep(n, x):\n    return x\n{GIVEN}{asked}"
    found: dict[int, Any] = {}

    class Asked(Machine):
        def call_function(self, func: Any, args: Any, kwargs: Any) -> Any:
            if func.name == "keep":
                found[args[0]] = plain(args[1])
            return super().call_function(func, args, kwargs)

    over(partial(Asked, Script("train_gpt.py", text, ast.parse(text)), Settings()), SHORT, ())
    return found


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Array):
        return None if value.num is None else value.num.tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(math.isclose(one, other, rel_tol=1e-6)) if isinstance(one, float) else one == other


@pytest.mark.parametrize("number", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
def test_a_trial_works_out_what_the_library_does(number: int) -> None:
    names: dict[str, Any] = {"np": np, "torch": torch, "math": math, "itertools": itertools, "functools": functools}
    exec(GIVEN, names)
    wanted = plain(eval(EXPRESSIONS[number], names))
    found = answers(*EXPRESSIONS)[number]
    assert same(wanted, found), (wanted, found)


@pytest.mark.parametrize("said", ["pow(7, 10 ** 9, 10 ** 5000)", "bytes(1 << 40)", 'hash("a")', "pow(10, 10 ** 9)"])
def test_what_no_script_needs_or_nobody_can_know_stays_unknown(said: str) -> None:
    assert isinstance(answers(said)[0], Unknown)
