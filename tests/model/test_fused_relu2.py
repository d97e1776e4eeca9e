"""The fused relu²: its twin is relu², its kernel is its twin (under Triton's interpreter), the compiler cannot pass it
by, and the journal says which of the two ran."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairway import steps
from fairway.artifact.bundle import unpacked
from fairway.base.devices import choose
from fairway.base.journal import Run
from fairway.lab.submit import train_script
from fairway.lab.submit.export import needs, requirements
from fairway.model import ModelSpec, build_model, tags
from fairway.model.mlp import fused_relu2, relu2
from fairway.recipe import load
from tests.model.variants import BASE, VOCAB
from tests.tiny.way import SAMPLE, TINY

triton_only = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (it comes with torch's CUDA builds)"
)
ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
FUSED = (
    f"data.path={SAMPLE}",
    "model.mlp=fused_relu2",
    "train.schedule.steps=3",
    "score.result=quantized",
    "score.adapt=none",
    "proof_bytes=0",
    "baselines=false",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_twin_is_relu2_to_the_last_bit_value_and_gradient(dtype: torch.dtype) -> None:
    p = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    p[0] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, float("inf"), 300.0, -300.0])
    one, other = p.clone().requires_grad_(), p.clone().requires_grad_()
    a, b = fused_relu2.relu2(one), relu2.relu2(other)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(a, b)
    assert torch.equal(one.grad, other.grad)


def test_a_model_of_it_is_that_of_relu2_name_by_name_and_bit_by_bit() -> None:
    """So it packs the same, and weights of the one are weights of the other."""
    fused, plain = (build_model(ModelSpec(**{**BASE, "mlp": m.Spec()}), VOCAB, 3) for m in (fused_relu2, relu2))
    assert tags(fused) == tags(plain)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), plain.parameters(), strict=True))
    tokens = torch.arange(24).view(2, 12) % VOCAB
    found = [model.logits(model(tokens)[0]) for model in (fused, plain)]
    assert torch.equal(*found)


def test_the_journal_says_that_the_twin_ran_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(fused_relu2, "MISSING", "No module named 'triton'")
    fused_relu2.report(lambda name, **values: said.append((name, values)), torch.device("cuda"))
    why = "No module named 'triton'; its PyTorch twin"
    assert said == [("substitution", {"what": "model.mlp = fused_relu2", "why": why})]


def test_a_run_on_a_cpu_books_that_the_twin_ran(tmp_path: Path) -> None:
    chosen = load(str(TINY), FUSED)
    with Run(tmp_path) as run:
        text = steps.prepare(chosen, run)
        steps.train(chosen, text, run, choose("cpu"))
    facts = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    (said,) = (fact for fact in facts if fact.get("what") == "model.mlp = fused_relu2")
    assert said["fact"] == "substitution"
    assert said["why"].endswith("; its PyTorch twin")


def test_a_script_holds_the_kernel_where_the_recipe_names_it_and_asks_nobody_to_install_triton() -> None:
    for kind in ("fused_relu2", "relu2"):
        script = train_script(load("b6", (f"model.mlp={kind}",))).decode()
        held = unpacked(script)[1]
        assert ("fairway.model.kernels.relu2" in held) == (kind == "fused_relu2")
        assert not any(line.startswith("triton") for line in requirements(needs(script)))


KERNEL = """
import torch

from fairway.model.kernels import relu2 as kernels
from fairway.model.mlp import fused_relu2

assert fused_relu2.why_twin(torch.device("cpu")) == ""


def both(p, above):
    found = []
    for function in (fused_relu2.relu2, kernels.relu2):
        given = p.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(given)
        y.backward(above)
        found += [y.detach(), given.grad]
    return found


chance, compared = torch.Generator().manual_seed(1), 0
layouts = {
    "whole": lambda p: p,
    "transposed": lambda p: p.transpose(0, -1),
    "every other": lambda p: p[..., ::2],
    "expanded": lambda p: p[..., :1].expand(*p.shape[:-1], 3),
}
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    for shape in ((0,), (1,), (5,), (1023,), (1024,), (1025,), (3, 5, 171)):
        for layout in layouts.values():
            if layout is layouts["expanded"] and shape == (0,):
                continue
            p = layout(3 * torch.randn(shape, generator=chance).to(dtype))
            above = torch.randn(p.shape, generator=chance).to(dtype)
            twin, slope, fused, fused_slope = both(p, above)
            for a, b in ((twin, fused), (slope, fused_slope)):
                if dtype == torch.bfloat16:  # the interpreter cuts bf16 off where a device rounds: one unit in the last
                    assert bool(((a - b).abs() <= a.abs() * 2**-7).all())
                else:
                    assert torch.equal(a, b), (dtype, shape)
            compared += 1
odd = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-30, 1e30])
for a, b in zip(both(odd, torch.ones(7))[:2], both(odd, torch.ones(7))[2:], strict=True):
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), (a, b)
p = torch.randn(4, 6, dtype=torch.float64, generator=chance, requires_grad=True)
assert torch.autograd.gradcheck(kernels.relu2, (p,))
torch.library.opcheck(kernels.relu2, (torch.randn(7, 5, generator=chance, requires_grad=True),))

part = fused_relu2.Technique(fused_relu2.Spec(), 6, 10, 0)
for weight in part.parameters():
    torch.nn.init.normal_(weight)
z = torch.randn(5, 6, generator=chance)
plain = part(z)
compiled = torch.compile(part, fullgraph=True, dynamic=False, backend="aot_eager")
before = dict(kernels.launches)
y = compiled(z)
y.sum().backward()
assert torch.equal(y, plain)
assert kernels.launches["square"] == before["square"] + 1, "the compiler passed the kernel by"
assert kernels.launches["slope"] == before["slope"] + 1, "the compiler passed the backward kernel by"
print(compared)
"""


@triton_only
def test_the_kernel_is_its_twin_and_the_compiler_cannot_pass_it_by(tmp_path: Path) -> None:
    """Bit by bit in float32, float64 and float16, at odd sizes and layouts; the gradient by finite differences; and
    under torch.compile(fullgraph=True) the launches are counted."""
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300, env=INTERPRETED
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "108\n"


@triton_only
def test_an_exported_script_launches_the_kernel_in_training(tmp_path: Path) -> None:
    """Triton reads a kernel's source, which the script's import loader holds. Three steps of three layers."""
    script = tmp_path / "train_gpt.py"
    script.write_bytes(train_script(load(str(TINY), FUSED)))
    done = subprocess.run(
        [sys.executable, str(script), "--device", "cpu"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=INTERPRETED | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )
    assert done.returncode == 0, done.stderr
    (journal,) = (tmp_path / "runs").glob("*/journal.jsonl")
    facts = [json.loads(line) for line in journal.read_text().splitlines()]
    (said,) = (fact for fact in facts if fact["fact"] == "kernel")
    assert (said["square"], said["slope"]) == (9, 9)
