"""Rotary position embedding of queries and keys, after an RMSNorm of each head where asked.

For one head x (D,), R of its channels rotated, the rest passed through:

    x = x / sqrt(mean(x^2) + eps) * (weight_offset + w)                  only with qk_norm_eps
    half-split:  (a, b) = (x[i], x[i + R/2])     interleaved: (a, b) = (x[2i], x[2i + 1])      i < R/2
    a' = a cos_i - b sin_i
    b' = b cos_i + a sin_i

The rotation's gradient is the rotation by -sin. Bytes: q and k read and written once, cos and sin once per position;
saved for backward: cos and sin, and q and k where they are normalised. Arithmetic in fp32 (in float64 for float64),
one rounding at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._runtime import without_kernel

_HEADS_AXIS = {1: 1, -3: 1, 2: 2, -2: 2}


def _rotated_channels(head_dim: int, width: int, rotary_dim: int | None) -> int:
    """R, from the tables' last dimension: see `rotary_embedding`."""
    rotated = rotary_dim
    if rotated is None:
        rotated = head_dim if 2 * width == head_dim else width
    if rotated % 2 or not 0 < rotated <= head_dim or width not in (rotated, rotated // 2):
        raise ValueError(
            f"cos, sin: got last dimension {width} (rotary_dim={rotary_dim}) for a head dimension of {head_dim}; give "
            "tables of R or R/2 with an even R, at most the head dimension"
        )
    return rotated


def _check_tables(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads_axis: int) -> None:
    """Raise ValueError unless the four shapes belong together."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q, k: got shapes {tuple(q.shape)} and {tuple(k.shape)}; give two 4-d tensors with one head dimension"
        )
    time_axis = 3 - heads_axis
    batch, time = q.shape[0], q.shape[time_axis]
    if (k.shape[0], k.shape[time_axis]) != (batch, time):
        raise ValueError(
            f"q, k: got shapes {tuple(q.shape)} and {tuple(k.shape)}; batch and positions must agree (heads are axis "
            f"{heads_axis}, positions axis {time_axis}; head_dim_axis chooses)"
        )
    fits = cos.shape[:-1] == (time,) or (cos.dim() == 3 and cos.shape[0] in (1, batch) and cos.shape[1] == time)
    if cos.shape != sin.shape or not fits:
        raise ValueError(
            f"cos, sin: got shapes {tuple(cos.shape)} and {tuple(sin.shape)}; q {tuple(q.shape)} with positions on "
            f"axis {time_axis} calls for ({time}, R or R/2) or ({batch}, {time}, R or R/2)"
        )


def _norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> Tensor:
    """RMSNorm over the head dimension, in x's (wide) dtype."""
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * (weight.to(x.dtype) + weight_offset)


def _full_tables(cos: Tensor, sin: Tensor, rotated: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """A cos and a signed sin for each of the R channels, from tables of width R or R/2."""
    half = rotated // 2
    if cos.shape[-1] == half:
        first, second, cos_first, cos_second = sin, sin, cos, cos
    elif interleaved:
        first, second, cos_first, cos_second = sin[..., 0::2], sin[..., 1::2], cos[..., 0::2], cos[..., 1::2]
    else:
        first, second, cos_first, cos_second = *sin.split(half, -1), *cos.split(half, -1)
    if interleaved:
        return torch.stack((cos_first, cos_second), -1).flatten(-2), torch.stack((-first, second), -1).flatten(-2)
    return torch.cat((cos_first, cos_second), -1), torch.cat((-first, second), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R channels of x by tables of `_full_tables`: x_i cos_i + partner(x)_i (+-sin_i)."""
    rotated = cos.shape[-1]
    turned = x[..., :rotated]
    # As a roll rather than as slices put together: a third of the time on a CPU, most of it in backward.
    if interleaved:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = turned.roll(rotated // 2, -1)
    turned = torch.addcmul(turned * cos, partner, sin)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), -1)


def rotary_embedding_reference(
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
    """`rotary_embedding` in PyTorch's operators: the definition, and the path where no kernel runs."""
    if head_dim_axis not in _HEADS_AXIS:
        raise ValueError(f"head_dim_axis: got {head_dim_axis!r}; give 1 for (B, H, T, D) or 2 for (B, T, H, D)")
    if qk_norm_eps is None and (q_weight is not None or k_weight is not None):
        raise ValueError("qk_norm_eps: got None with q_weight or k_weight; give the norm's eps, e.g. 1e-6")
    heads_axis = _HEADS_AXIS[head_dim_axis]
    _check_tables(q, k, cos, sin, heads_axis)
    rotated = _rotated_channels(q.shape[-1], cos.shape[-1], rotary_dim)
    wide = torch.promote_types(q.dtype, torch.float32)
    # (T, R) -> (T, 1, R) or (1, T, R); with a batch in front the same axis counted from the end.
    cos, sin = (table.to(wide).unsqueeze(-2 if heads_axis == 2 else -3) for table in (cos, sin))
    cos, sin = _full_tables(cos, sin, rotated, interleaved)
    result = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x.to(wide)
        if qk_norm_eps is not None:
            y = _norm(y, weight, qk_norm_eps, weight_offset)
        result.append(_rotate(y, cos, sin, interleaved).to(x.dtype))
    return result[0], result[1]


@without_kernel("rotary_embedding has no kernel yet: PyTorch's operators")
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
