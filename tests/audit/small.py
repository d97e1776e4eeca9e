"""A small honest script of our own, in pieces that a test replaces, and the verdict of one rule on it."""

import importlib
from collections.abc import Iterable
from pathlib import Path

from fairway.audit.case import Case
from fairway.audit.submission import opened
from fairway.audit.verdict import Finding

HEAD = """
import glob, math, os
import numpy as np
import torch
import torch.nn.functional as F
import sentencepiece as spm

V = 1024
VAL = os.environ.get("VAL_FILES", "data/fineweb_val_*.bin")

def shard(path):
    return np.fromfile(path, dtype="<u2", offset=1024).astype(np.int64)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(V, 64)

    def forward(self, ids):
        return F.linear(F.rms_norm(self.table(ids), (64,)), self.table.weight)
"""

TABLE = """
def tables():
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    size, lead, edge = np.zeros(V), np.zeros(V, bool), np.ones(V, bool)
    for i in range(V):
        if sp.is_control(i) or sp.is_unknown(i):
            continue
        edge[i] = False
        if sp.is_byte(i):
            size[i] = 1
            continue
        piece = sp.id_to_piece(i)
        if piece.startswith("\\u2581"):
            lead[i] = True
            piece = piece[1:]
        size[i] = len(piece.encode("utf-8"))
    return size, lead, edge
"""

COUNT = "size[y].sum() + (lead[y] & ~edge[x]).sum()"

LOSS = """
        logits = net(torch.from_numpy(x))
        nll = F.cross_entropy(logits.float(), torch.from_numpy(y), reduction="none")
"""

SCORE = """
def evaluate(net):
    tokens = np.concatenate([shard(path) for path in sorted(glob.glob(VAL))]){few}
    size, lead, edge = tables()
    nats, octets, count = 0.0, 0.0, 0
    {state}
    for at in range(0, len(tokens) - 1, 512):
        piece = tokens[at : at + 513]
        x, y = piece[:-1], piece[1:]
{loss}
        nats += nll.sum().item()
        octets += {count}
        count += len(y)
    loss = nats / count
    return loss, {bpb}

if __name__ == "__main__":
    loss, bpb = evaluate(Net())
    print(f"val_loss {{loss:.5f}} val_bpb {{bpb:.5f}}")
"""

BPB = "loss / math.log(2) * (count / octets)"


FEW = "[:4097]"


def script(
    table: str = TABLE,
    count: str = COUNT,
    loss: str = LOSS,
    state: str = "pass",
    bpb: str = BPB,
    extra: str = "",
    few: str = FEW,
) -> str:
    """The script with some of its pieces replaced. few: how many tokens it scores, "" for all: a trial of some of them
    takes a tenth of the time where they are gone through one by one, and most rules ask no more."""
    return HEAD + table + extra + SCORE.format(loss=loss, count=count, state=state, bpb=bpb, few=few)


def verdict(folder: Path, rule: str, text: str, strict: bool = False, **files: str) -> Finding:
    """The finding of one rule (by the name of its file) on a folder with this train_gpt.py; files: others beside it,
    `__` in a name stands for the dot."""
    return verdicts(folder, (rule,), text, strict, **files)[rule]


def verdicts(folder: Path, rules: Iterable[str], text: str, strict: bool = False, **files: str) -> dict[str, Finding]:
    """The same of several rules, which share what was worked out of the script."""
    (folder / "train_gpt.py").write_text(text, encoding="utf-8")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    case = Case(opened(folder), strict)
    found: dict[str, Finding] = {}
    for rule in rules:
        finding: Finding = importlib.import_module(f"fairway.audit.rules.{rule}").check(case)
        assert finding.id == rule.replace("_", "-")
        assert finding.clause
        found[rule] = finding
    return found


def line_of(text: str, part: str) -> int:
    """The number of the one line that holds this."""
    found = [number for number, line in enumerate(text.split("\n"), 1) if part in line]
    assert len(found) == 1, found
    return found[0]
