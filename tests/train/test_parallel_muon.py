"""Parallel Muon is Muon: on one rank to the last bit, on several within 1e-6 after steps that were clipped; its saved
state is whole, and it sees whole matrices."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fairway.artifact.bundle import unpacked
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.lab.submit import train_script
from fairway.recipe import load
from fairway.train import pretrain
from fairway.train.loop import OptimSpec
from fairway.train.optim import muon, parallel_muon
from fairway.train.orthogonal import newton_schulz
from tests.train.test_loop import CPU, Pattern, model, weights
from tests.train.whole import F64, TRAINED, gradients, problem, reference

WORDS = [{}, {"row_norm": True}, {"coefficients": "polar_express"}, {"nesterov": False}]


@pytest.mark.parametrize("words", WORDS, ids=str)
def test_on_one_rank_it_is_muon_to_the_last_bit(words: dict) -> None:
    expected, plain = reference(5, words=words)
    found = problem()
    optimizer = parallel_muon.build(parallel_muon.Spec(lr=0.1, **words), found[:-1], Ranks())
    for step in range(5):
        for parameter, one, other in zip(found, gradients(step, 0), gradients(step, 1), strict=True):
            parameter.grad = one + other
        optimizer.step()
    for place, (a, b) in enumerate(zip(expected[:-1], found[:-1], strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(plain.state[a]["momentum"], optimizer.state_dict()["state"][place]["momentum"])


def test_on_one_rank_a_matrix_without_a_gradient_keeps_its_weights_and_its_momentum() -> None:
    one, other = problem(), problem()
    first = muon.build(muon.Spec(), one[:-1], Ranks())
    second = parallel_muon.build(parallel_muon.Spec(), other[:-1], Ranks())
    for step in range(4):
        for parameters in (one, other):
            for place, (parameter, gradient) in enumerate(zip(parameters, gradients(step, 0), strict=True)):
                parameter.grad = None if (place in (0, 1) and step == 2) else gradient.clone()
        first.step()
        second.step()
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_narrow_momentum_is_kept_in_bf16_and_restores_bit_for_bit() -> None:
    spec = parallel_muon.Spec(narrow_momentum=True)

    def descend(parameters, optimizer, steps: range) -> None:
        for step in steps:
            for parameter, gradient in zip(parameters, gradients(step, 0), strict=True):
                parameter.grad = gradient
            optimizer.step()

    whole, halved = problem(), problem()
    descend(whole, parallel_muon.build(spec, whole[:-1], Ranks()), range(6))
    first = parallel_muon.build(spec, halved[:-1], Ranks())
    descend(halved, first, range(3))
    second = parallel_muon.build(spec, halved[:-1], Ranks())
    second.load_state_dict(first.state_dict())
    assert {state["momentum"].dtype for state in second.state.values()} == {torch.bfloat16}
    descend(halved, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, halved, strict=True))


def test_slices_of_rows_would_be_another_method() -> None:
    """The trap of the study's run: a reduce-scatter that cuts rows hands Newton–Schulz 8 of 64 rows. Each slice becomes
    orthogonal by itself, the matrix does not: its update points elsewhere."""
    u = torch.randn(64, 64, dtype=F64, generator=torch.Generator().manual_seed(7))
    whole = newton_schulz(u)
    sliced = torch.cat([newton_schulz(rows) for rows in u.split(8)])
    assert torch.linalg.svdvals(whole).max() < 1.3
    assert torch.linalg.svdvals(sliced).max() > 1.8
    assert torch.nn.functional.cosine_similarity(whole.flatten(), sliced.flatten(), dim=0) < 0.9
    (parameter,) = problem()[:1]
    parameter.grad = torch.randn(6, 10, dtype=F64, generator=torch.Generator().manual_seed(8))
    before, gradient = parameter.detach().clone(), parameter.grad.clone()
    spec = parallel_muon.Spec(lr=0.1, weight_decay=0.0, momentum_start=0.0, momentum_warmup=0, momentum=0.0)
    parallel_muon.build(spec, [parameter], Ranks()).step()
    torch.testing.assert_close(parameter.detach(), before - 0.1 * newton_schulz(gradient))


RANKS = """
import copy
from pathlib import Path

import torch

from fairway.base.ranks import Ranks
from fairway.train import owned
from fairway.train.optim import parallel_muon
from tests.train.whole import CLIP, gradients, problem, reference

ranks = Ranks.start(cuda=False)


def descend(parameters, optimizer, steps, dtype):
    for step in steps:
        for place, parameter in enumerate(parameters):  # the parts of the batch go to the first and to the last rank
            parts = [p for p in (0, 1) if (0, ranks.world - 1)[p] == ranks.rank and not (p == 1 and place == 2)]
            parameter.grad = gradients(step, parts[0], dtype)[place] if parts else None
        owned.reduce([optimizer], parameters, ranks, CLIP)
        optimizer.step()
        with torch.no_grad():
            parameters[-1] -= 0.1 * parameters[-1].grad


def distance(parameters, expected):
    return max(float((a - b).abs().max()) for a, b in zip(parameters, expected, strict=True))


said = []
for dtype in (torch.float64, torch.float32):
    expected, plain = reference(6, dtype, CLIP)
    parameters = problem(dtype)
    spec = parallel_muon.Spec(lr=0.1)
    optimizer = parallel_muon.build(spec, parameters[:-1], ranks)
    assert optimizer.state_dict()["state"] == {}
    descend(parameters, optimizer, range(3), dtype)
    held = len(optimizer.state)
    saved = copy.deepcopy(optimizer.state_dict())
    half, plain_half = reference(3, dtype, CLIP)
    momenta = distance(
        [saved["state"][place]["momentum"] for place in range(6)],
        [plain_half.state[parameter]["momentum"] for parameter in half[:-1]],
    )
    again = parallel_muon.build(spec, parameters[:-1], ranks)  # as a run that goes on
    again.load_state_dict(copy.deepcopy(saved))
    assert len(again.state) == held
    descend(parameters, again, range(3, 6), dtype)
    alone = problem(dtype)  # the same saved state, taken up by one rank alone
    with torch.no_grad():
        for mine, other in zip(alone, half, strict=True):
            mine.copy_(other)
    one = parallel_muon.build(spec, alone[:-1], Ranks())
    one.load_state_dict(saved)
    for step in range(3, 6):
        for parameter, a, b in zip(alone, gradients(step, 0, dtype), gradients(step, 1, dtype), strict=True):
            parameter.grad = a + b
        owned.reduce([one], alone, Ranks(), CLIP)
        one.step()
        with torch.no_grad():
            alone[-1] -= 0.1 * alone[-1].grad
    said.append([held, distance(parameters, expected), momenta, distance(alone, expected)])
Path(__file__).with_name(f"rank{ranks.rank}").write_text(repr(said))
ranks.stop()
"""


def started(world: int, script: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "src"), str(root)])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo is tried on POSIX")
def test_three_ranks_step_as_muon_does_on_one_with_the_whole_gradient_clipped(tmp_path: Path) -> None:
    """Six steps, interrupted and taken up in the middle, by as many ranks and by one. Each rank holds the momenta of
    its own matrices alone: of banks of three, two and one."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    started(3, script)
    for rank, held in enumerate((3, 2, 1)):
        for limit, (count, *distances) in zip((1e-12, 1e-6), eval((tmp_path / f"rank{rank}").read_text()), strict=True):
            assert count == held
            assert max(distances) < limit, distances


LOOP = """
import shutil
from pathlib import Path

import pytest
import torch

from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.train import pretrain
from tests.train.test_loop import CPU, Pattern, model, weights
from tests.train.whole import TRAINED

ranks, place = Ranks.start(cuda=False), Path(__file__).parent
with Run(place / "run", ranks) as run, pytest.raises(KeyboardInterrupt):
    pretrain(model().double(), Pattern(stop_at=7), TRAINED, run, CPU, seed=0)
if ranks.first:
    shutil.copytree(place / "run", place / "copy")
ranks.wait()
resumed, data = model(seed=5).double(), Pattern()
with Run(place / "run", ranks) as run:
    pretrain(resumed, data, TRAINED, run, CPU, seed=0)
assert data.asked == [7, 8, 9, 10, 11], data.asked
torch.save(weights(resumed), place / f"weights{ranks.rank}")
ranks.stop()
"""


@pytest.mark.skipif(os.name == "nt", reason="torchrun with gloo is tried on POSIX")
def test_the_loop_by_two_ranks_is_that_of_muon_by_one_and_either_number_goes_on_from_its_checkpoint(tmp_path) -> None:
    """Twelve steps, clipped, with a checkpoint after each; killed after seven and taken up by two ranks and by one."""
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    started(2, script)
    expected, alone, data = model().double(), model(seed=5).double(), Pattern()
    pretrain(expected, Pattern(), replace(TRAINED, optim=OptimSpec(matrix=muon.Spec(lr=0.02))), Run(), CPU, seed=0)
    with Run(tmp_path / "copy") as run:
        pretrain(alone, data, TRAINED, run, CPU, seed=0)
    assert data.asked == [7, 8, 9, 10, 11]
    by_two = [torch.load(tmp_path / f"weights{rank}", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*by_two)
    for found in (by_two[0], weights(alone)):
        torch.testing.assert_close(found, weights(expected), atol=1e-6, rtol=0)


def test_a_script_holds_it_where_the_recipe_names_it_and_only_there() -> None:
    for kind in ("parallel_muon", "muon"):
        recipe = load("b6", (f"train.optim.matrix={kind}",))
        held = set(unpacked(train_script(recipe).decode())[1])
        assert {"fairway.train.owned", "fairway.train.optim.parallel_muon"} & held == (
            {"fairway.train.owned", "fairway.train.optim.parallel_muon"} if kind == "parallel_muon" else set()
        )
        assert "fairway.train.polar_express" not in held
    recipe = load("b6", ("train.optim.matrix={ kind = 'muon', coefficients = 'polar_express' }",))
    assert "fairway.train.polar_express" in unpacked(train_script(recipe).decode())[1]
