"""Weights in a dict, moved by hand, and hints that are looked up position by position before anything is scored."""

import pytest

from tests.audit.order import broken, doubted, trace_of

SCRIPT = """
import glob, math, os
import numpy as np
import torch
import torch.nn.functional as F

DEPTH = int(os.environ.get("DEPTH", "9"))
P, MATS = {}, []

def load(pattern):
    return torch.cat([torch.from_numpy(np.fromfile(p, "<u2").astype(np.int64)) for p in sorted(glob.glob(pattern))])

def matrix(name, rows):
    P[name] = torch.empty(rows, 64)
    MATS.append(name)

def build():
    P["table"] = torch.randn(1024, 64)
    for i in range(DEPTH):
        matrix(f"{i}.up", 64)
    BUILT

build()

def logits(x):
    h = F.embedding(x, P["table"])
    for i in range(DEPTH):
        h = h + F.linear(h, P[f"{i}.up"])
    return F.linear(h, P["table"])

def step(x, y, rate, moved):
    F.cross_entropy(logits(x).flatten(0, 1), y.flatten()).backward()
    for k in list(P):
        moved[k].mul_(0.9).add_(P[k].grad)
        P[k].data.add_(moved[k], alpha=-rate)
        P[k].grad = None

def train(T):
    moved = {k: torch.zeros_like(P[k]) for k in P}
    for i in range(9000):
        step(T[i * 4096 : i * 4096 + 4096].view(4, -1), T[i * 4096 + 1 : i * 4096 + 4097].view(4, -1), 0.1, moved)

def hints(V):
    out, seen = np.full(len(V), -1), {}
    for i in range(len(V) - 1):
        key = int(V[i])
        HINT

    return torch.from_numpy(out)

def evaluate(V):
    total, count, moved = 0.0, 0, {k: torch.zeros_like(P[k]) for k in P}
    hint = hints(V.numpy())
    for c in range((V.numel() - 1) // 4096):
        x, y = V[c * 4096 : c * 4096 + 4096].view(4, -1), V[c * 4096 + 1 : c * 4096 + 4097].view(4, -1)
        LEARN FIRST
        with torch.no_grad():
            h = hint[c * 4096 : c * 4096 + 4096].view(4, -1)
            z = logits(x).scatter_add(2, h.clamp_min(0)[..., None], (h >= 0).float()[..., None])
            total += F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum").item()
            count += y.numel()
        LEARN AFTERWARDS
    return total / count

train(load("./data/shards_train_*.bin"))
print(f"final val_loss:{evaluate(load('./data/shards_val_*.bin')):.6f}")
"""
BUILT = {
    "leaves in a loop over the keys": "for k in list(P):\n        P[k] = P[k].to('cuda').requires_grad_(True)",
    "leaves by assignment": "for k, v in list(P.items()):\n        P[k] = v.to('cuda').float().requires_grad_()",
    "leaves where they are": "for w in P.values():\n        w.requires_grad_(True)",
    "leaves that were worked out": "for k, v in list(P.items()):\n        P[k] = v * 0.02\n"
    "    for w in P.values():\n        w.requires_grad_(True)",
    "leaves by what they are told": "for k, w in P.items():\n        w.requires_grad = True",
    "parameters": "for k in P.keys():\n        P[k] = torch.nn.Parameter(P[k].cuda())",
}
LOOKED_UP = "if key in seen: out[i] = seen[key]\n        "
ENTERED = "seen[key] = int(V[i + 1])\n        "


def script(built: str, hint: str = LOOKED_UP + ENTERED, first: bool = False) -> str:
    learn = "step(x, y, 1e-3, moved)"
    text = SCRIPT.replace("BUILT", built).replace("HINT", hint)
    return text.replace("LEARN FIRST", learn if first else "").replace("LEARN AFTERWARDS", "" if first else learn)


@pytest.mark.parametrize("built", BUILT.values(), ids=BUILT)
def test_weights_in_a_dict_that_are_moved_by_hand_learn(built: str) -> None:
    assert doubted(script(built)) == set()
    assert "training-before-scoring" in broken(script(built, first=True))


def test_gradients_that_each_rank_has_a_share_of_learn() -> None:
    """What is scattered to the ranks, and gathered again, is what the step follows."""
    shared = (
        "share, full = torch.empty_like(P[k]), P[k].grad.contiguous()\n"
        "        torch.distributed.reduce_scatter_tensor(share, full)\n"
        "        moved[k].mul_(0.9).add_(share)"
    )
    own = "moved[k].mul_(0.9).add_(P[k].grad)"
    built = BUILT["leaves where they are"]
    assert doubted(script(built).replace(own, shared)) == set()
    assert "training-before-scoring" in broken(script(built, first=True).replace(own, shared))


def test_a_hint_knows_the_positions_before_it_unless_its_answer_was_entered_first() -> None:
    built = BUILT["parameters"]
    assert doubted(script(built, LOOKED_UP + ENTERED)) == set()
    assert "two-pass-cache" in broken(script(built, ENTERED + LOOKED_UP))


APART = """
import os, torch
P = {"shared": torch.nn.Parameter(torch.zeros(8, 8))}
for name in os.environ["NAMES"].split(","):
    P[name] = torch.nn.Parameter(torch.zeros(8, 8))
x = torch.randint(0, 8, (4, 8))
torch.nn.functional.cross_entropy(torch.nn.functional.embedding(x, P[NAME]).flatten(0, 1), x.flatten())
"""


def test_leaves_that_different_lines_make_under_keys_of_one_dict_are_told_apart() -> None:
    (shared,) = {state for score in trace_of(APART.replace("NAME]", "'shared']")).scores for state in score.states}
    others = {state for score in trace_of(APART.replace("NAME]", "input()]")).scores for state in score.states}
    assert shared.place is not None
    assert shared.place.line == 3
    assert 5 in {state.place.line for state in others if state.place is not None}
