"""Kernels that a script writes itself: what their text says of losses, and what the audit makes of a score of them."""

import ast
from pathlib import Path

import pytest

from fairway.audit.reading.kernels import operators, prices
from tests.audit.small import script, verdicts

BY_ADDRESS = """
@triton.jit
def price(logits_ptr, target_ptr, loss_ptr, lse_ptr, stride, V, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    base = logits_ptr + row.to(tl.int64) * stride
    top, total = -float("inf"), 0.0
    for off in range(0, V, BLOCK):
        c = off + tl.arange(0, BLOCK)
        z = tl.load(base + c, mask=c < V, other=-float("inf")).to(tl.float32)
        z = cap * (2.0 * tl.sigmoid(2.0 * z / cap) - 1.0)
        new = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(z - new), axis=0)
        top = new
    lse = top + tl.log(total)
    t = tl.load(target_ptr + row)
    own = tl.load(base + t).to(tl.float32)
    tl.store(lse_ptr + row, lse)
    tl.store(loss_ptr + row, lse - cap * (2.0 * tl.sigmoid(2.0 * own / cap) - 1.0))
"""

BY_MASK = """
@triton.autotune(configs=[], key=["V"])
@triton.jit
def price(logits_ptr, target_ptr, loss_ptr, lse_ptr, stride, V, cap, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * 4 + tl.arange(0, 4)
    t = tl.load(target_ptr + rows)
    c = tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + rows[:, None] * stride + c[None, :], mask=c[None, :] < V, other=-float("inf"))
    own = tl.sum(tl.where(c[None, :] == t[:, None], z, 0.0), axis=1)
    top = tl.max(z, axis=1)
    lse = top + tl.log(tl.sum(tl.exp(z - top[:, None]), axis=1))
    tl.store(loss_ptr + rows, lse - own)
    tl.store(lse_ptr + rows, lse)
"""

GRADIENT = """
@triton.jit
def price(logits_ptr, target_ptr, lse_ptr, grad_ptr, stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    t = tl.load(target_ptr + row)
    lse = tl.load(lse_ptr + row)
    c = tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * stride + c, mask=c < V)
    tl.store(grad_ptr + row * stride + c, tl.exp(z - lse) - tl.where(c == t, 1.0, 0.0), mask=c < V)
"""

ACTIVATION = """
@triton.jit
def price(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(y_ptr + at, tl.where(x > 0, x * x, 0.0), mask=at < n)
"""


def kernel(text: str) -> ast.AST:
    return next(node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("text", [BY_ADDRESS, BY_MASK], ids=["by-address", "by-mask"])
def test_a_kernel_that_writes_the_loss_of_each_row_says_so(text: str) -> None:
    found = prices(kernel(text))
    assert found is not None
    assert (found.logits, found.targets, found.losses) == ("logits_ptr", "target_ptr", ("loss_ptr",))


@pytest.mark.parametrize(
    "text",
    [
        GRADIENT,
        ACTIVATION,
        BY_ADDRESS.replace("@triton.jit", "@torch.no_grad()"),
        BY_ADDRESS.replace("tl.store(loss_ptr + row, lse - cap", "own = (lse - cap"),
    ],
    ids=["gradient", "activation", "no-kernel", "normaliser-alone"],
)
def test_what_writes_no_loss_is_none_of_them(text: str) -> None:
    assert prices(kernel(text)) is None


def test_operators_are_known_by_the_name_that_torch_gives_them() -> None:
    text = '@torch.library.custom_op("own::price", mutates_args=())\ndef op(logits, targets):\n    pass\n'
    assert operators(ast.parse(text)) == {"torch.ops.own.price": "op"}


LAUNCH = """
    loss = torch.empty(logits.shape[0], device=logits.device, dtype=torch.float32)
    lse = torch.empty_like(loss)
    price[(logits.shape[0],)](logits, targets, loss, lse, logits.stride(0), V, 30.0, BLOCK=1024)
"""
IN_A_FUNCTION = f"\ndef priced(logits, targets):{LAUNCH}    return loss\n"
OPERATOR = (
    '\n@torch.library.custom_op("own::price", mutates_args=())\n'
    f"def op(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:{LAUNCH}"
    "    return loss, lse\n\n@op.register_fake\ndef _(logits, targets):\n"
    "    return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape[0])\n\n"
    "op.register_autograd(lambda ctx, one, two: None, setup_context=lambda ctx, inputs, output: None)\n"
    "\ndef priced(logits, targets):\n    return op(logits.contiguous(), targets.reshape(-1))[0]\n"
)
WAYS = {
    "launched": IN_A_FUNCTION,
    "by-its-names": IN_A_FUNCTION.replace("loss, lse, logits.stride(0), V, 30.0", "lse_ptr=lse, loss_ptr=loss, V=V"),
    "operator": OPERATOR,
    "torch.ops": OPERATOR.replace("return op(", "return torch.ops.own.price("),
}
LOSS = """
        logits = net(torch.from_numpy(x))
        nll = priced(logits.float(), torch.from_numpy(y))
"""
RULES = ("twice_counted_tokens", "byte_double_space", "false_normalisation", "byte_constant")
MIXED = (
    "        row = torch.from_numpy(seen / max(seen.sum(), 1.0) * 1.5)\n"
    "        nll = -torch.log(0.9 * torch.exp(-nll) + 0.1 * row[torch.from_numpy(y)])\n"
    "        np.add.at(seen, y, 1.0)\n"
)


def charges(folder: Path, way: str, loss: str = LOSS, **parts: str) -> set[str]:
    text = script(loss=loss, extra="import triton\nimport triton.language as tl\n" + BY_ADDRESS + way, few="", **parts)
    return {rule for rule, found in verdicts(folder, RULES, text).items() if found.verdict == "violates"}


@pytest.mark.parametrize("way", WAYS)
def test_losses_of_a_kernel_are_followed_as_those_of_torch_are(tmp_path: Path, way: str) -> None:
    assert charges(tmp_path, WAYS[way]) == set()
    assert charges(tmp_path, WAYS[way], LOSS + "        nll = torch.cat((nll, nll[:64]))\n") == {"twice_counted_tokens"}
    assert charges(tmp_path, WAYS[way], count="size[y].sum() + lead[y].sum() + lead[y].sum()") == {"byte_double_space"}
    assert charges(tmp_path, WAYS[way], bpb="loss / math.log(2) / 3.7") == {"byte_constant"}
    assert charges(tmp_path, WAYS[way], LOSS + MIXED, state="seen = np.ones(V)") == {"false_normalisation"}
