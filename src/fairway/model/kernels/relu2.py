"""relu(p)² and its slope, elementwise, in Triton. Its twin: model/mlp/fused_relu2.py.

Computed in float32, or in float64 for float64, and rounded once, as torch does. Importing this module needs triton,
which comes with torch's CUDA builds. Under Triton's interpreter (TRITON_INTERPRET=1) it runs on any device, slowly.
"""

from collections import Counter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of one program
launches: Counter[str] = Counter()  # of this process, by kernel


@triton.jit  # type: ignore[untyped-decorator]
def square(p, y, count, block: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(p + at, mask=at < count).to(wide)
    value = tl.where(value <= 0, 0, value)  # what is no number stays none
    tl.store(y + at, (value * value).to(y.dtype.element_ty), mask=at < count)


@triton.jit  # type: ignore[untyped-decorator]
def slope(p, gradient, result, count, block: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    value = tl.load(p + at, mask=at < count).to(wide)
    above = tl.load(gradient + at, mask=at < count).to(wide)
    below = tl.where(value <= 0, 0, above * (2 * value))
    tl.store(result + at, below.to(result.dtype.element_ty), mask=at < count)


def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device: on CUDA, and anywhere where they are interpreted."""
    return device.type == "cuda" or not isinstance(square, triton.runtime.JITFunction)


@torch.library.custom_op("fairway::relu2", mutates_args=())
def relu2(p: Tensor) -> Tensor:
    """p: any shape and layout -> relu(p)², contiguous."""
    y = _like(p)
    _launch(square, p.contiguous(), y)
    return y


@torch.library.custom_op("fairway::relu2_slope", mutates_args=())
def relu2_slope(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of p, from p and the gradient of relu(p)², of equal shapes."""
    result = _like(p)
    _launch(slope, p.contiguous(), gradient.contiguous(), result)
    return result


def _launch(kernel: Any, *tensors: Tensor) -> None:
    """All tensors contiguous, of equal size; the last one is written."""
    count = tensors[-1].numel()
    wide = tl.float64 if tensors[-1].dtype == torch.float64 else tl.float32
    if count:
        with torch.cuda.device_of(tensors[-1]):
            kernel[(triton.cdiv(count, BLOCK),)](*tensors, count, block=BLOCK, wide=wide)
    launches[kernel.__name__] += 1


def _like(p: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(p, memory_format=torch.contiguous_format)


def _backward(context: Any, gradient: Tensor) -> Tensor:
    result: Tensor = relu2_slope(*context.saved_tensors, gradient)
    return result


relu2.register_fake(_like)
relu2_slope.register_fake(_like)
# torch passes these three by their names, which an exported script would shorten in a function.
relu2.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
