"""Two gloo processes score what one does, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fairway.artifact import open_artifact
from fairway.base.journal import Run
from fairway.base.specs import build
from fairway.score import ScoreSpec, evaluate, tokens_of

from .conftest import ADAPT, text_of

WORKER = """
import dataclasses, json, sys, time
from pathlib import Path
import torch
from fairway.artifact import open_artifact
from fairway.base.errors import BudgetError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.score import WindowPredictor, evaluate, spec_of, tokens_of
from fairway.score.reshape import ngram_tilt

torch.set_num_threads(1)
ranks = Ranks.start(cuda=False)
file, text, out = map(Path, sys.argv[1:])
artifact = open_artifact(file)
held_out, spec = tokens_of(artifact, text.read_bytes()), spec_of(artifact)
tilted = dataclasses.replace(spec, reshape=(ngram_tilt.Spec((ngram_tilt.Level((4, 3, 2), 0.5, 1),)),))
odd = dataclasses.replace(spec, adapt=dataclasses.replace(spec.adapt, batch=3))
found = {
    "sliding": evaluate(file, held_out, spec, Run(ranks=ranks), "sliding").bits_per_byte,
    "tilted": evaluate(file, held_out, tilted, Run(ranks=ranks), "sliding").bits_per_byte,
    "even": evaluate(file, held_out, spec, Run(ranks=ranks), "adapted").bits_per_byte,
    "odd": evaluate(file, held_out, odd, Run(ranks=ranks), "adapted").bits_per_byte,
}

def slowly(self, unit, predict=WindowPredictor.predict):
    time.sleep(0.0 if ranks.first else 0.2)
    return predict(self, unit)

WindowPredictor.predict = slowly  # about 20 units of the sliding stage, 4 s on rank 1 alone
late = dataclasses.replace(spec, result="sliding", block_tokens=64)
try:
    evaluate(file, held_out, late, Run(ranks=ranks), "sliding", limit=2.0)
except BudgetError as error:
    found["late"] = str(error)
(out / f"{ranks.rank}.json").write_text(json.dumps(found))
ranks.stop()
"""


@pytest.fixture(scope="module")
def two_ranks(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    (folder / "text").write_bytes(text_of(70_000, 1_500))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "worker.py")]
    done = subprocess.run(
        [sys.executable, *command, str(files[1]), str(folder / "text"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(("name", "batch"), [("sliding", 0), ("tilted", 0), ("even", 4), ("odd", 3)])
def test_two_ranks_score_what_one_does(two_ranks, files, spec, name, batch):
    """Chunks of 256 are 4 sequences of 64. Odd: batches of 3 and 1, so that one rank has none; it takes every step."""
    held_out = tokens_of(open_artifact(files[1]), text_of(70_000, 1_500))
    table = {"result": "adapted", "windows": {"kind": "sliding", "stride": 16}, "adapt": {**ADAPT, "batch": batch or 1}}
    stage = "sliding" if name in ("sliding", "tilted") else "adapted"
    if name == "tilted":
        table["reshape"] = [{"kind": "ngram_tilt", "levels": [{"orders": [4, 3, 2], "confidence": 0.5, "count": 1}]}]
    one = evaluate(files[1], held_out, build(ScoreSpec, table), Run(), stage).bits_per_byte
    assert two_ranks[0][name] == two_ranks[1][name], "all ranks hold the same score"
    assert abs(two_ranks[0][name] - one) < 1e-6


def test_a_slow_rank_stops_all_ranks_early(two_ranks):
    """Rank 0 alone had time left, and would have waited for the other in the next collective."""
    assert all("sliding score, projected" in found.get("late", "") for found in two_ranks)
