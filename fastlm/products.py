"""fp32 matrix products on a CPU: oneDNN's where PyTorch's own would use half of the processor.

PyTorch multiplies fp32 matrices by MKL, which takes AVX-512 on Intel's processors alone. oneDNN, which PyTorch brings
along too, takes it wherever it is there: 2.1 times as fast on one core of a Zen 5, the same on MKL told that it were
on Intel's (LOG.md). Both sum in fp32; the rounding differs.

    C = A B^T;   dA = G B,   dB = G^T A:   both are such a product again, of transposed views
"""

from __future__ import annotations

import functools
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below so many multiplications MKL is faster: oneDNN spends 10 us a call on looking its code up.
LEAST_MULTIPLICATIONS = 2**21


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., K) and (N, K) -> (..., N)."""
    if not _taken(input, weight):
        return F.linear(input, weight, bias)
    flat = input.reshape(-1, input.size(-1))
    return multiply(flat, weight, bias).view(*input.shape[:-1], weight.size(0))


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T (+ bias) of an fp32 (M, K) and (N, K) by oneDNN, differentiable any number of times: (M, N)."""
    if torch.is_grad_enabled():
        return _Product.apply(a, b, bias)  # type: ignore[return-value]
    return _product(a, b, bias)


@functools.cache
def available() -> bool:
    """Whether oneDNN is the faster one here: a processor with AVX-512 that is not Intel's."""
    wide = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and _vendor() != "GenuineIntel" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _vendor() -> str:
    """The processor's maker, "AuthenticAMD" for one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(named, platform.processor().rpartition(" ")[2])


def _taken(input: Tensor, weight: Tensor) -> bool:
    if input.dtype != torch.float32 or weight.dtype != torch.float32 or input.device.type != "cpu":
        return False
    if math.prod(input.shape) * weight.size(0) < LEAST_MULTIPLICATIONS or not available():
        return False
    # An autograd function of this form knows no functorch, and no autocast.
    special = torch._C._are_functorch_transforms_active() or torch.is_autocast_enabled("cpu")
    return torch.backends.mkldnn.enabled and not special


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """The operator reads `b` by its strides and copies an `a` that is transposed: let that be the smaller one."""
    if bias is None and not a.is_contiguous() and not b.is_contiguous() and b.size(0) < a.size(0):
        return _product(b, a, None).t()
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b)
        return _product(a, b, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_a = multiply(grad, b.t()) if wanted[0] else None
        grad_b = multiply(grad.t(), a.t()) if wanted[1] else None
        return grad_a, grad_b, grad.sum(0) if wanted[2] else None
