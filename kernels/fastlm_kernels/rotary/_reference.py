"""The definition in PyTorch's operators, and what it asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

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


def check_shapes(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim_axis: int, rotary_dim: int | None
) -> tuple[int, int]:
    """(the axis of the heads, R); ValueError unless the shapes belong together."""
    if not _is_int(head_dim_axis) or head_dim_axis not in _HEADS_AXIS:
        raise ValueError(f"head_dim_axis: got {head_dim_axis!r}; give 1 for (B, H, T, D) or 2 for (B, T, H, D)")
    if rotary_dim is not None and not _is_int(rotary_dim):
        raise ValueError(f"rotary_dim: got {rotary_dim!r}; give an even int, at most the head dimension, or None")
    heads_axis = _HEADS_AXIS[head_dim_axis]
    _check_tables(q, k, cos, sin, heads_axis)
    return heads_axis, _rotated_channels(q.shape[-1], cos.shape[-1], rotary_dim)


def check_norm(
    q: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, qk_norm_eps: float | None, weight_offset: float
) -> None:
    """Raise ValueError unless the norm's options are numbers and vectors that belong together."""
    if qk_norm_eps is None and (q_weight is not None or k_weight is not None):
        raise ValueError("qk_norm_eps: got None with q_weight or k_weight; give the norm's eps, e.g. 1e-6")
    if qk_norm_eps is not None and not _is_finite(qk_norm_eps):
        raise ValueError(f"qk_norm_eps: got {qk_norm_eps!r}; give a finite number, or None for no norm")
    if not _is_finite(weight_offset):
        raise ValueError(f"weight_offset: got {weight_offset!r}; give a finite number")
    if weight_offset != 0.0 and q_weight is None and k_weight is None:
        raise ValueError(
            f"weight_offset: got {weight_offset!r} with no weight; give q_weight or k_weight, or weight_offset=0.0"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None or (isinstance(weight, Tensor) and weight.shape == q.shape[-1:]):
            continue
        got = f"shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(f"{name}: got {got}; give a tensor of shape {tuple(q.shape[-1:])}, or None")


def _is_finite(value: Any) -> bool:
    # Compared, not asked math.isfinite: the compiler traces a number that varies from call to call.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


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
        (first, second), (cos_first, cos_second) = (t.unflatten(-1, (-1, 2)).unbind(-1) for t in (sin, cos))
    else:
        first, second, cos_first, cos_second = *sin.split(half, -1), *cos.split(half, -1)
    if interleaved:
        return torch.stack((cos_first, cos_second), -1).flatten(-2), torch.stack((-first, second), -1).flatten(-2)
    return torch.cat((cos_first, cos_second), -1), torch.cat((-first, second), -1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R channels of x by tables of `_full_tables`: x_i cos_i + partner(x)_i (+-sin_i)."""
    rotated = cos.shape[-1]
    turned = x.narrow(-1, 0, rotated)
    # As a roll rather than as slices put together: a third of the time on a CPU, most of it in backward.
    if interleaved:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = turned.roll(rotated // 2, -1)
    turned = torch.addcmul(turned * cos, partner, sin)
    rest = x.shape[-1] - rotated
    return torch.cat((turned, x.narrow(-1, rotated, rest)), -1) if rest else turned


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
    heads_axis, rotated = check_shapes(q, k, cos, sin, head_dim_axis, rotary_dim)
    check_norm(q, q_weight, k_weight, qk_norm_eps, weight_offset)
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
