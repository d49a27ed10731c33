"""Newton-Schulz: a matrix's nearest semi-orthogonal one, approximately, by products alone.

    X = U / max(|U|, eps), the shorter side first        A = X X^T
    X = a X + (b A + c A^2) X                            (a, b, c) = (3.4445, -4.7750, 2.0315), five times

The coefficients trade exactness for speed: singular values end between about 0.7 and 1.2, tiny ones below. FLOPs of one
step on (r, c), r <= c: 4 r^2 c + 2 r^3 by plain products; A and b A + c A^2 are symmetric, and computing one triangle
of each leaves 3 r^2 c + r^3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _runtime
from .._runtime import with_kernel
from ._symmetric import symmetric_product

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_EPS = 1e-7
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@with_kernel
def newton_schulz(
    matrices: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    eps: float = NS_EPS,
) -> Tensor:
    """Orthogonalise a batch (K, r, c) of matrices, or one (r, c); same shape and dtype.

    Runs in the dtype given: fp32 on a CPU, bf16 is enough on a GPU. A matrix of zeros stays zero.
    """
    triton = _runtime.choose(matrices, obstacle=_obstacle(matrices), prefer_torch=_preference(matrices))
    with torch.no_grad():
        x = matrices if matrices.dim() == 3 else matrices[None]
        wide = x.shape[-2] <= x.shape[-1]
        x = x if wide else x.mT
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_sum_dtype(x)).clamp(min=eps)
        x = torch.div(x, norm).to(x.dtype).contiguous()
        step = _step_triton if triton else _step_torch
        for _ in range(steps):
            x = step(x, *coefficients)
        x = x if wide else x.mT
        return x.reshape(matrices.shape).contiguous()


def _obstacle(matrices: Tensor) -> str | None:
    if matrices.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {matrices.dtype}"
    if matrices.dtype == torch.bfloat16 and _runtime.INTERPRETED:
        return "Triton's interpreter multiplies bf16 wrongly"
    return None


def _preference(matrices: Tensor) -> str | None:
    slow = matrices.dtype == torch.float32 and not _runtime.INTERPRETED
    return "the kernel's fp32 products use no tensor cores" if slow else None


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _step_torch(x: Tensor, a: float, b: float, c: float) -> Tensor:
    gram = torch.bmm(x, x.mT)
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(x, polynomial, x, beta=a)


def _step_triton(x: Tensor, a: float, b: float, c: float) -> Tensor:
    gram = symmetric_product(x)
    polynomial = symmetric_product(gram, alpha=c, add=gram, beta=b)
    return torch.baddbmm(x, polynomial, x, beta=a)
