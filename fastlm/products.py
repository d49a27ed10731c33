"""fp32 matrix products on a CPU: oneDNN's where PyTorch's own would use half of the processor.

PyTorch multiplies fp32 matrices by MKL, which takes AVX-512 on Intel's processors alone. oneDNN, which PyTorch brings
along too, takes it wherever it is there: 2.1 times as fast on a core of a Zen 5, and as fast as MKL told that it runs
on Intel's (LOG.md). Both sum in fp32; the rounding differs.

    C = A B^T;   dA = G B,   dB = G^T A:   both are such a product again, of transposed views
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlm import machine

# Below so many multiplications MKL is faster: oneDNN spends 10 us a call on finding its code.
LEAST_MULTIPLICATIONS = 2**21


def _is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and machine.processor() != "GenuineIntel"


ONEDNN_IS_FASTER = _is_faster()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., K) and (N, K) -> (..., N)."""
    if not (ONEDNN_IS_FASTER and _covered(input, weight)):
        return F.linear(input, weight, bias)
    flat = input.reshape(-1, input.size(-1))
    return multiply(flat, weight, bias).view(*input.shape[:-1], weight.size(0))


def _covered(input: Tensor, weight: Tensor) -> bool:
    if input.device.type != "cpu" or input.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if math.prod(input.shape) * weight.size(0) < LEAST_MULTIPLICATIONS or torch.is_autocast_enabled("cpu"):
        return False
    # functorch wants more of an autograd function than this one's form says.
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias of fp32 (M, K), (N, K) and (N,) by oneDNN -> (M, N). Differentiable any number of times."""
    # Inductor's own form of the operator below wants weights that never change, and PyTorch keeps no compiled code
    # between runs where an autograd function stands in it. Called op by op, one costs less than a registered operator.
    if torch.compiler.is_compiling():
        return torch.ops.fastlm.product(a, b, bias)
    return _Product.apply(a, b, bias) if torch.is_grad_enabled() else _compute(a, b, bias)  # type: ignore[return-value]


def _compute(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The operator reads `b` by its strides and copies an `a` that is transposed: let that be the smaller one."""
    if bias is None and not a.is_contiguous() and not b.is_contiguous() and b.size(0) < a.size(0):
        return _compute(b, a, None).t().contiguous()
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # oneDNN's reference code would multiply it, in a second instead of a millisecond
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor | None) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor, product: Callable[..., Tensor] = multiply) -> tuple[Tensor | None, ...]:
    (a, b), wanted = ctx.saved_tensors, ctx.needs_input_grad
    grad_a = product(grad, b.t(), None) if wanted[0] else None
    grad_b = product(grad.t(), a.t(), None) if wanted[1] else None
    return grad_a, grad_b, grad.sum(0) if wanted[2] else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, None)
        return _compute(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grads[0])


_LIBRARY = torch.library.Library("fastlm", "DEF")
_LIBRARY.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_LIBRARY.impl("product", _compute, "CPU")


@torch.library.register_fake("fastlm::product", lib=_LIBRARY)
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(a.size(0), b.size(0))


def _registered_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad, torch.ops.fastlm.product)


torch.library.register_autograd("fastlm::product", _registered_gradients, setup_context=_keep, lib=_LIBRARY)
