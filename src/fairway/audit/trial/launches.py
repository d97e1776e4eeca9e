"""What a kernel of the script itself, `kernel[grid](logits, targets, losses, ...)`, leaves in its arguments."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping

from fairway.audit.reading.kernels import Priced
from fairway.audit.trial.host import Compute
from fairway.audit.trial.values import Frame, Lib, Value

_ENTROPY = Lib("torch.nn.functional.cross_entropy")
_Call = Callable[[Lib, tuple[Value, ...], dict[str, Value], int], Value]


def launch(call: ast.expr, kernels: Mapping[str, Priced]) -> tuple[Priced, dict[str, ast.expr]] | None:
    """The kernel that writes losses and what is given for each of its parameters; None of other calls."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)):
        return None
    kernel = kernels.get(getattr(call.func.value, "id", ""))
    given = kernel.given(call.args, [(each.arg, each.value) for each in call.keywords]) if kernel is not None else {}
    return (kernel, given) if kernel is not None and given else None


def launched(
    logits: Compute, targets: Compute, bind: list[Callable[[Frame, Value], None]], foreign: _Call, line: int
) -> Callable[[Frame], None]:
    """The tensors that it writes hold from then on what torch's own cross entropy gives of these."""

    def run(frame: Frame) -> None:
        losses = foreign(_ENTROPY, (logits(frame), targets(frame)), {"reduction": "none"}, line)
        for each in bind:
            each(frame, losses)

    return run
