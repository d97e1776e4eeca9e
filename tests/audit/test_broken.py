"""Broken scripts: no crash, a bounded time, and a clear "cannot read" with the line. The long run is a bench."""

import ast
from pathlib import Path

import pytest

from fairway.audit import audit_all
from fairway.audit.examine import rule_modules
from tests.audit.folders import SCRIPT
from tests.audit.mutations import MUTATIONS, mutated

SCORING = b'''"""Scores a text, window by window."""
import math
import numpy as np
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self, vocab, width):
        super().__init__()
        self.embed = torch.nn.Embedding(vocab, width)
        self.head = torch.nn.Linear(width, vocab)

    def forward(self, x, y):
        logits = self.head(self.embed(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))


def evaluate(model, tokens, lengths, window=64):
    total, count, size = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, window):
            part = tokens[start : start + window + 1]
            x, y = part[:-1], part[1:]
            total += model(x[None], y[None]).item() * len(y)
            count += len(y)
            size += int(lengths[y].sum())
    return total / count, total / math.log(2) / size


def main():
    model = Model(1024, 32)
    train = torch.from_numpy(np.fromfile("train.bin", dtype=np.uint16).astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(100):
        x = train[step * 64 : step * 64 + 65]
        loss = model(x[None, :-1], x[None, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held_out = torch.from_numpy(np.fromfile("val.bin", dtype=np.uint16).astype(np.int64))
    loss, bpb = evaluate(model, held_out, torch.ones(1024))
    print(f"val_loss:{loss:.4f} val_bpb:{bpb:.4f}")


if __name__ == "__main__":
    main()
'''


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    for name, content in mutated([SCRIPT.encode(), SCORING], 2 * len(MUTATIONS), seed=1):
        (folder / name).write_bytes(content)
    return folder


def test_a_broken_script_never_crashes_the_audit_and_is_said_to_be_unreadable_with_its_line(broken: Path) -> None:
    paths = sorted(broken.iterdir())
    reports = audit_all(paths, workers=1, seconds=30)
    assert len(reports) == len(paths)
    for path, report in zip(paths, reports, strict=True):
        assert len(report.rules) == len(rule_modules())
        assert report.facts.get("failed", {}) == {}, (path.name, report.facts["failed"])
        unreadable = report.facts["cannot_read"]
        if path.suffix == ".py" and _refused(path.read_bytes()):
            place = next(f.place for f in report.rules if f.evidence.startswith("cannot read"))
            assert place is not None
            assert place.line >= 1, report.facts
            assert unreadable
        for said in unreadable.values():
            assert said


def _refused(content: bytes) -> bool:
    """Whether Python itself refuses a text."""
    try:
        ast.parse(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return True
    return False
