"""Rotary position embedding of queries and keys, after an RMSNorm of each head where asked.

For one head x (D,), R of its channels rotated, the rest passed through:

    x = x / sqrt(mean(x^2) + eps) * (weight_offset + w)                  only with qk_norm_eps
    half-split:  (a, b) = (x[i], x[i + R/2])     interleaved: (a, b) = (x[2i], x[2i + 1])      i < R/2
    a' = a cos_i - b sin_i
    b' = b cos_i + a sin_i

The rotation is linear and its transpose is the rotation by -sin, so that with u = rotation by -sin of the upstream
gradient, x^ = x rstd the normed head and g = u (weight_offset + w):

    dx = u                                       without the norm
    dx = rstd (g - x^ mean(g x^))                with it, the mean over all D channels
    dw = sum over batch, positions and heads of u x^

Memory traffic per element of q and k, s bytes each (2 in bf16): forward reads and writes it once, 2 s; backward reads
the upstream gradient and writes dx, 2 s, and with the norm reads x again, 3 s. One launch serves q and k. cos and sin
(R fp32 numbers a position in the R/2 form: as many bytes as one head's 16-bit x and y) are loaded once for a group of
heads and stay in registers for it, so that they come from L2 at a fraction of x's rate. Saved for backward: cos and
sin; with the norm q, k and the weights too, whose rstd is computed again in registers.

A program keeps a block of positions of one head after another in registers: BLOCK_T x D elements, all of a head, for
the norm's sums need no second read. Programs of one block of positions are neighbours in the grid, so that the tables
stay in L2 and heads adjacent in memory are read together. Weight gradients are summed in registers over the blocks
that one program walks, written to a partial buffer and added up in a second small pass in a fixed order.

q, k and the upstream gradients are read where they lie, whatever their batch, head and position strides: views of one
merged projection take no copy. Arithmetic in fp32 (in float64 for float64), one rounding at the end.

In order of reading: `_tiles` (what kernels share), `_rotation` and `_norm_backward` (kernels and their launchers),
`_operators` (registration), `_reference` (the definition in PyTorch's operators), and here the public function;
`_launch` is what launchers share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _runtime
from .._runtime import with_kernel
from ._launch import Options
from ._operators import rotary_backward, rotary_forward
from ._reference import check_norm, check_shapes, rotary_embedding_reference

__all__ = ["rotary_backward", "rotary_embedding", "rotary_embedding_reference", "rotary_forward"]

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 1024


def _obstacle(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None
) -> str | None:
    """Why the kernels do not cover this call."""
    weights = [w for w in (q_weight, k_weight) if w is not None]
    for tensor in (q, k, cos, sin, *weights):
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
    if q.dtype != k.dtype:
        return f"q is {q.dtype}, k is {k.dtype}"
    if q.shape[-1] > _LARGEST_HEAD:
        return f"a head dimension of {q.shape[-1]}, above {_LARGEST_HEAD}"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos or sin requires a gradient"
    return None


@with_kernel
def rotary_embedding(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    head_dim_axis: int = 1,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    qk_norm_eps: float | None = None,
    weight_offset: float = 0.0,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k by their positions; with `qk_norm_eps` each head is RMS-normalised first.

    head_dim_axis names the axis that holds the heads, where cos and sin are broadcast:
        1 (default, also -3)   q (B, Hq, T, D), k (B, Hk, T, D)
        2 (also -2)            q (B, T, Hq, D), k (B, T, Hk, D)
    cos, sin: (T, W), (1, T, W) or (B, T, W). W is R, a table entry per rotated channel, or R/2, one per pair; R <= D is
    even, channels R.. pass through. rotary_dim gives R; without it W = D/2 means a full rotation (R = D), any other W
    means R = W. `interleaved` pairs channels (2i, 2i + 1), and a table of width R is read in that order too; otherwise
    (i, i + R/2).
    q_weight, k_weight: (D,), scaled as weight_offset + weight, and need qk_norm_eps; None is a norm without weights.

    Returns (q, k), new tensors of their shapes and dtypes; every input is differentiable. ValueError for shapes that
    do not belong together.
    """
    heads_axis, rotated = check_shapes(q, k, cos, sin, head_dim_axis, rotary_dim)
    check_norm(q, q_weight, k_weight, qk_norm_eps, weight_offset)
    obstacle = _obstacle(q, k, cos, sin, q_weight, k_weight)
    if _runtime.choose(q, k, cos, sin, q_weight, k_weight, obstacle=obstacle):
        eps = None if qk_norm_eps is None else float(qk_norm_eps)
        options = Options(heads_axis, rotated, interleaved, eps, float(weight_offset))
        q, k = rotary_forward(q, k, cos, sin, q_weight, k_weight, *options)
        return q, k
    return rotary_embedding_reference(
        q,
        k,
        cos,
        sin,
        interleaved=interleaved,
        head_dim_axis=head_dim_axis,
        q_weight=q_weight,
        k_weight=k_weight,
        qk_norm_eps=qk_norm_eps,
        weight_offset=weight_offset,
        rotary_dim=rotary_dim,
    )
