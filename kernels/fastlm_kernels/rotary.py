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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _runtime, configs
from ._rows import accumulator, sum_partials
from ._runtime import Operator, kernel, launch, tl, with_kernel

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 1024
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


def _check_norm(
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


def _check_shapes(
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
    heads_axis, rotated = _check_shapes(q, k, cos, sin, head_dim_axis, rotary_dim)
    _check_norm(q, q_weight, k_weight, qk_norm_eps, weight_offset)
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


# Kernels. PAIRS = R / 2 pairs of channels a position, tiles (BLOCK_T, BLOCK_P); channels past R in tiles (BLOCK_T,
# BLOCK_REST), none where BLOCK_REST is 0. Strides of heads come in units of UNIT elements and the tables' in units of
# TABLE_UNIT, 8 where 8 divides them all, so that the compiler sees aligned rows and loads 16 bytes at once.


@kernel()
def _load_pairs(X, rows, step, t_ok, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr, ACC):
    """The first and the second channel of each pair, (BLOCK_T, BLOCK_P) each; channels lie `step` apart."""
    if INTERLEAVED:
        # Neighbours in one wide load, parted in registers.
        cols = tl.arange(0, 2 * BLOCK_P)
        mask = t_ok[:, None] & (cols < 2 * PAIRS)[None, :]
        x = tl.load(X + rows[:, None] + cols[None, :] * step, mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, [x.shape[0], BLOCK_P, 2]))
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        at = X + rows[:, None] + cols[None, :] * step
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + PAIRS * step, mask=mask, other=0.0)
    return a.to(ACC), b.to(ACC)


@kernel()
def _store_pairs(Y, rows, a, b, t_ok, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr):
    a, b = a.to(Y.dtype.element_ty), b.to(Y.dtype.element_ty)
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK_P)
        mask = t_ok[:, None] & (cols < 2 * PAIRS)[None, :]
        y = tl.reshape(tl.join(a, b), [a.shape[0], 2 * BLOCK_P])
        tl.store(Y + rows[:, None] + cols[None, :], y, mask=mask)
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        at = Y + rows[:, None] + cols[None, :]
        tl.store(at, a, mask=mask)
        tl.store(at + PAIRS, b, mask=mask)


@kernel()
def _load_table(
    TABLE,
    rows,
    step,
    t_ok,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    ACC: tl.constexpr,
):
    """The entries of each pair's two channels: the same where the table has one a pair."""
    if FULL:
        first, second = _load_pairs(TABLE, rows, step, t_ok, PAIRS, BLOCK_P, INTERLEAVED, ACC)
    else:
        cols = tl.arange(0, BLOCK_P)
        mask = t_ok[:, None] & (cols < PAIRS)[None, :]
        first = tl.load(TABLE + rows[:, None] + cols[None, :] * step, mask=mask, other=0.0).to(ACC)
        second = first
    return first, second


@kernel()
def _rest(t_ok, PAIRS: tl.constexpr, D: tl.constexpr, BLOCK_REST: tl.constexpr):
    """(channels past R, mask)"""
    cols = 2 * PAIRS + tl.arange(0, BLOCK_REST)
    return cols, t_ok[:, None] & (cols < D)[None, :]


@kernel()
def _load_weight(
    W,
    weighted,
    weight_offset,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACC: tl.constexpr,
):
    """weight_offset + w for the channels of pairs, (1, BLOCK_P) twice, and the rest; ones unless `weighted`."""
    one = tl.zeros([1], dtype=tl.int32)
    a, b = _load_pairs(W, one, 1, one == 0, PAIRS, BLOCK_P, INTERLEAVED, ACC)
    a, b = tl.where(weighted, a + weight_offset, 1.0), tl.where(weighted, b + weight_offset, 1.0)
    rest = a
    if BLOCK_REST > 0:
        cols, mask = _rest(one == 0, PAIRS, D, BLOCK_REST)
        rest = tl.load(W + cols[None, :], mask=mask, other=0.0).to(ACC)
        rest = tl.where(weighted, rest + weight_offset, 1.0)
    return a, b, rest


@kernel()
def _turn(a, b, cos_a, cos_b, sin_a, sin_b, INVERSE: tl.constexpr):
    """The rotation, or its transpose."""
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b


_VARYING = ("positions", "heads_q", "heads_k", "groups_q", "groups_k", "group_heads", "stride_cb", "stride_ct")


@kernel(
    do_not_specialize=(
        *_VARYING,
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt"),
        *("stride_yqb", "stride_yqh", "stride_yqt", "stride_ykb", "stride_ykh", "stride_ykt"),
    )
)
def rotary_kernel(
    Q,
    K,
    COS,
    SIN,
    WQ,
    WK,
    YQ,
    YK,
    positions,
    heads_q,
    heads_k,
    groups_q,
    groups_k,
    group_heads,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_yqb,
    stride_yqh,
    stride_yqt,
    stride_ykb,
    stride_ykh,
    stride_ykt,
    stride_cb,
    stride_ct,
    stride_cr,
    eps,
    weight_offset,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    UNIT: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    INVERSE: tl.constexpr,
    NORM: tl.constexpr,
    HAS_WQ: tl.constexpr,
    HAS_WK: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program = (batch, block of positions, group of heads of q or of k), groups fastest."""
    groups = groups_q + groups_k
    group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
    time_blocks = tl.cdiv(positions, BLOCK_T)
    # int64 from the start: a tensor may pass 2^31 elements.
    batch = (block // time_blocks).to(tl.int64)
    t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    t_ok = t < positions

    table_rows = (batch * stride_cb + t * stride_ct) * TABLE_UNIT
    cos_a, cos_b = _load_table(COS, table_rows, stride_cr, t_ok, PAIRS, BLOCK_P, INTERLEAVED, FULL, ACC)
    sin_a, sin_b = _load_table(SIN, table_rows, stride_cr, t_ok, PAIRS, BLOCK_P, INTERLEAVED, FULL, ACC)

    if group < groups_q:
        X, W, Y, heads, first, weighted = Q, WQ, YQ, heads_q, group * group_heads, HAS_WQ
        x_rows, x_head = (batch * stride_qb + t * stride_qt) * UNIT, tl.cast(stride_qh, tl.int64) * UNIT
        y_rows, y_head = (batch * stride_yqb + t * stride_yqt) * UNIT, tl.cast(stride_yqh, tl.int64) * UNIT
    else:
        X, W, Y, heads, first, weighted = K, WK, YK, heads_k, (group - groups_q) * group_heads, HAS_WK
        x_rows, x_head = (batch * stride_kb + t * stride_kt) * UNIT, tl.cast(stride_kh, tl.int64) * UNIT
        y_rows, y_head = (batch * stride_ykb + t * stride_ykt) * UNIT, tl.cast(stride_ykh, tl.int64) * UNIT
    if HAS_WQ or HAS_WK:
        w_a, w_b, w_rest = _load_weight(W, weighted, weight_offset, D, PAIRS, BLOCK_P, BLOCK_REST, INTERLEAVED, ACC)

    for head in range(first, tl.minimum(first + group_heads, heads)):
        x_at = x_rows + head * x_head
        y_at = y_rows + head * y_head
        a, b = _load_pairs(X, x_at, 1, t_ok, PAIRS, BLOCK_P, INTERLEAVED, ACC)
        if BLOCK_REST > 0:
            cols, rest_ok = _rest(t_ok, PAIRS, D, BLOCK_REST)
            rest = tl.load(X + x_at[:, None] + cols[None, :], mask=rest_ok, other=0.0).to(ACC)
        if NORM:
            squares = tl.sum(a * a + b * b, axis=1)
            if BLOCK_REST > 0:
                squares += tl.sum(rest * rest, axis=1)
            # rstd = 1 / sqrt(mean(x^2) + eps); positions past the last hold zeros, which eps = 0 would divide by
            rstd = tl.rsqrt(tl.where(t_ok, squares / D + eps, 1.0))[:, None]
            a, b = a * rstd, b * rstd
            if BLOCK_REST > 0:
                rest *= rstd
            if HAS_WQ or HAS_WK:
                a, b = a * w_a, b * w_b
                if BLOCK_REST > 0:
                    rest *= w_rest
        a, b = _turn(a, b, cos_a, cos_b, sin_a, sin_b, INVERSE)
        _store_pairs(Y, y_at, a, b, t_ok, PAIRS, BLOCK_P, INTERLEAVED)
        if BLOCK_REST > 0:
            tl.store(Y + y_at[:, None] + cols[None, :], rest.to(Y.dtype.element_ty), mask=rest_ok)


@kernel(
    do_not_specialize=(
        *(*_VARYING, "blocks", "steps"),
        *("stride_dyqb", "stride_dyqh", "stride_dyqt", "stride_dykb", "stride_dykh", "stride_dykt"),
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_kt"),
        *("stride_dqb", "stride_dqh", "stride_dqt", "stride_dkb", "stride_dkh", "stride_dkt"),
    )
)
def rotary_norm_backward_kernel(
    DYQ,
    DYK,
    Q,
    K,
    COS,
    SIN,
    WQ,
    WK,
    DQ,
    DK,
    DW,
    positions,
    blocks,
    steps,
    heads_q,
    heads_k,
    groups_q,
    groups_k,
    group_heads,
    stride_dyqb,
    stride_dyqh,
    stride_dyqt,
    stride_dykb,
    stride_dykh,
    stride_dykt,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_cb,
    stride_ct,
    stride_cr,
    eps,
    weight_offset,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    UNIT: tl.constexpr,
    TABLE_UNIT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FULL: tl.constexpr,
    HAS_WQ: tl.constexpr,
    HAS_WK: tl.constexpr,
    HAS_DW: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program = group of heads of q or of k, for every walkers-th block of positions of all batches."""
    groups = groups_q + groups_k
    group, walker = tl.program_id(0) % groups, tl.program_id(0) // groups
    walkers = tl.num_programs(0) // groups
    time_blocks = tl.cdiv(positions, BLOCK_T)
    if group < groups_q:
        DY, X, W, DX, heads, first, weighted = DYQ, Q, WQ, DQ, heads_q, group * group_heads, HAS_WQ
        stride_dyb, stride_dyt = tl.cast(stride_dyqb, tl.int64), tl.cast(stride_dyqt, tl.int64)
        stride_xb, stride_xt = tl.cast(stride_qb, tl.int64), tl.cast(stride_qt, tl.int64)
        stride_dxb, stride_dxt = tl.cast(stride_dqb, tl.int64), tl.cast(stride_dqt, tl.int64)
        stride_dyh, stride_xh = tl.cast(stride_dyqh, tl.int64), tl.cast(stride_qh, tl.int64)
        stride_dxh = tl.cast(stride_dqh, tl.int64)
        dw_row = walker * groups_q + group
    else:
        DY, X, W, DX, heads, first, weighted = DYK, K, WK, DK, heads_k, (group - groups_q) * group_heads, HAS_WK
        stride_dyb, stride_dyt = tl.cast(stride_dykb, tl.int64), tl.cast(stride_dykt, tl.int64)
        stride_xb, stride_xt = tl.cast(stride_kb, tl.int64), tl.cast(stride_kt, tl.int64)
        stride_dxb, stride_dxt = tl.cast(stride_dkb, tl.int64), tl.cast(stride_dkt, tl.int64)
        stride_dyh, stride_xh = tl.cast(stride_dykh, tl.int64), tl.cast(stride_kh, tl.int64)
        stride_dxh = tl.cast(stride_dkh, tl.int64)
        # q's programs come first in the partial buffer.
        dw_row = walkers * groups_q + walker * groups_k + group - groups_q
    dw_a = tl.zeros([BLOCK_T, BLOCK_P], dtype=ACC)
    dw_b = tl.zeros([BLOCK_T, BLOCK_P], dtype=ACC)
    if BLOCK_REST > 0:
        dw_rest = tl.zeros([BLOCK_T, BLOCK_REST], dtype=ACC)

    # Walker w takes blocks w, w + walkers, w + 2 walkers, ...: a fixed order, whatever runs first.
    for step in range(steps):
        block = step * walkers + walker
        batch = (block // time_blocks).to(tl.int64)
        t = (block % time_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        t_ok = (t < positions) & (block < blocks)
        table_rows = (batch * stride_cb + t * stride_ct) * TABLE_UNIT
        cos_a, cos_b = _load_table(COS, table_rows, stride_cr, t_ok, PAIRS, BLOCK_P, INTERLEAVED, FULL, ACC)
        sin_a, sin_b = _load_table(SIN, table_rows, stride_cr, t_ok, PAIRS, BLOCK_P, INTERLEAVED, FULL, ACC)
        # UNIT comes in here, not where q or k is chosen: Triton 3.6 forgets there that 8 divides a stride.
        dy_rows, x_rows, dx_rows = (
            (batch * stride_dyb + t * stride_dyt) * UNIT,
            (batch * stride_xb + t * stride_xt) * UNIT,
            (batch * stride_dxb + t * stride_dxt) * UNIT,
        )
        for head in range(first, tl.minimum(first + group_heads, heads)):
            dy_at, x_at, dx_at = (
                dy_rows + head * stride_dyh * UNIT,
                x_rows + head * stride_xh * UNIT,
                dx_rows + head * stride_dxh * UNIT,
            )
            # u, the gradient of the normed and scaled head
            dy_a, dy_b = _load_pairs(DY, dy_at, 1, t_ok, PAIRS, BLOCK_P, INTERLEAVED, ACC)
            g_a, g_b = _turn(dy_a, dy_b, cos_a, cos_b, sin_a, sin_b, True)
            x_a, x_b = _load_pairs(X, x_at, 1, t_ok, PAIRS, BLOCK_P, INTERLEAVED, ACC)
            squares = tl.sum(x_a * x_a + x_b * x_b, axis=1)
            if BLOCK_REST > 0:
                cols, rest_ok = _rest(t_ok, PAIRS, D, BLOCK_REST)
                g_rest = tl.load(DY + dy_at[:, None] + cols[None, :], mask=rest_ok, other=0.0).to(ACC)
                x_rest = tl.load(X + x_at[:, None] + cols[None, :], mask=rest_ok, other=0.0).to(ACC)
                squares += tl.sum(x_rest * x_rest, axis=1)
            # x^ = x rstd; positions past the last hold zeros, which eps = 0 would divide by
            rstd = tl.rsqrt(tl.where(t_ok, squares / D + eps, 1.0))[:, None]
            x_a, x_b = x_a * rstd, x_b * rstd
            if BLOCK_REST > 0:
                x_rest *= rstd
            # dw = sum of u x^, g = u (weight_offset + w)
            if HAS_DW:
                dw_a += g_a * x_a
                dw_b += g_b * x_b
                if BLOCK_REST > 0:
                    dw_rest += g_rest * x_rest
            if HAS_WQ or HAS_WK:
                # Here, from L1, and not before the loop, where they would hold the registers that tiles need.
                w_a, w_b, w_rest = _load_weight(
                    W, weighted, weight_offset, D, PAIRS, BLOCK_P, BLOCK_REST, INTERLEAVED, ACC
                )
                g_a, g_b = g_a * w_a, g_b * w_b
                if BLOCK_REST > 0:
                    g_rest *= w_rest
            # dx = rstd (g - x^ mean(g x^))
            dot = tl.sum(g_a * x_a + g_b * x_b, axis=1)
            if BLOCK_REST > 0:
                dot += tl.sum(g_rest * x_rest, axis=1)
            mean = (dot / D)[:, None]
            dx_a, dx_b = (g_a - x_a * mean) * rstd, (g_b - x_b * mean) * rstd
            _store_pairs(DX, dx_at, dx_a, dx_b, t_ok, PAIRS, BLOCK_P, INTERLEAVED)
            if BLOCK_REST > 0:
                dx_rest = (g_rest - x_rest * mean) * rstd
                tl.store(DX + dx_at[:, None] + cols[None, :], dx_rest.to(DX.dtype.element_ty), mask=rest_ok)

    if HAS_DW:
        row = tl.zeros([1], dtype=tl.int64) + dw_row.to(tl.int64) * D
        one_ok = row >= 0
        _store_pairs(
            DW,
            row,
            tl.sum(dw_a, axis=0)[None, :],
            tl.sum(dw_b, axis=0)[None, :],
            one_ok,
            PAIRS,
            BLOCK_P,
            INTERLEAVED,
        )
        if BLOCK_REST > 0:
            cols, rest_ok = _rest(one_ok, PAIRS, D, BLOCK_REST)
            tl.store(DW + row[:, None] + cols[None, :], tl.sum(dw_rest, axis=0)[None, :], mask=rest_ok)


# Launchers. A side is q or k; what belongs to a side that takes no part is None.


class _Options(NamedTuple):
    """What every operator here takes besides tensors, in the order of the schemas."""

    heads_axis: int
    rotated: int
    interleaved: bool
    eps: float | None
    weight_offset: float


_Pair = Sequence[Tensor | None]


def _like(x: Tensor) -> Tensor:
    """An empty tensor whose axes lie in memory in x's order, as `torch.empty_like` has it, channels adjacent."""
    y = torch.empty_like(x)
    return y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _adjacent(x: Tensor | None) -> Tensor | None:
    """None for no head at all, a copy only where channels do not lie side by side."""
    if x is None or x.numel() == 0:
        return None
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_units(strides: Sequence[int]) -> tuple[int, list[int]]:
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def _strides(tensors: _Pair, heads_axis: int) -> tuple[int, list[int]]:
    """(unit, [batch, head, position] of each tensor in units); an axis of one element has no stride to speak of."""
    axes = (0, heads_axis, 3 - heads_axis)
    return _in_units([0 if x is None or x.shape[axis] == 1 else x.stride(axis) for x in tensors for axis in axes])


def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, int, list[int]]:
    """(cos, sin, unit, [batch, position, channel] strides, the same for both)."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch = cos.stride(0) if cos.dim() == 3 and cos.shape[0] > 1 else 0
    time = cos.stride(-2) if cos.shape[-2] > 1 else 0
    unit, strides = _in_units((batch, time))
    return cos, sin, unit, [*strides, cos.stride(-1)]


class _Plan(NamedTuple):
    """How one launch is cut into programs."""

    time: int
    blocks: int  # of positions, in all batches
    walkers: int  # programs a group of heads
    heads: list[int]
    groups: list[int]
    group_heads: int
    num_warps: int
    sizes: dict[str, Any]


def _plan(sides: _Pair, everyone: _Pair, options: _Options, summed: bool = False) -> _Plan:
    """How to cut the work; `summed`: weights' gradients are.

    `everyone`'s heads decide, so that a sum's order is the same whichever sides take part.
    """
    like = next(x for x in sides if x is not None)
    batch, time, width = like.shape[0], like.shape[3 - options.heads_axis], like.shape[3]
    block_p = _power_of_2(options.rotated // 2)
    block_rest = _power_of_2(width - options.rotated)
    architecture = _runtime.architecture(like.device)
    # Half the elements a thread also where three sums and three parts of a head would take more than its registers.
    narrow = options.interleaved or (summed and block_rest > 0)
    table = configs.ROTARY_INTERLEAVED if narrow else configs.ROTARY
    config = configs.row_config(table, architecture, 2 * block_p + block_rest)
    blocks = batch * -(-time // config.block_m)
    heads, all_heads = ([0 if x is None else x.shape[options.heads_axis] for x in pair] for pair in (sides, everyone))
    programs = configs.ROTARY_PARTIAL_PROGRAMS if block_rest else configs.programs_per_multiprocessor(config)
    resident = _runtime.multiprocessors(like.device) * programs
    group_heads = configs.rotary_group_heads(blocks * sum(all_heads), resident)
    sizes = {"D": width, "PAIRS": options.rotated // 2, "BLOCK_T": config.block_m}
    sizes |= {"BLOCK_P": block_p, "BLOCK_REST": block_rest, "INTERLEAVED": options.interleaved}
    groups, all_groups = ([-(-count // group_heads) for count in counts] for counts in (heads, all_heads))
    # With sums to keep, as many programs as stay resident, each walking many blocks; else one a block.
    walkers = min(blocks, max(1, resident // sum(all_groups))) if summed else blocks
    return _Plan(time, blocks, walkers, heads, groups, group_heads, config.num_warps, sizes)


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that holds n; 0 for 0."""
    return 1 << (n - 1).bit_length() if n else 0


def _launch_rotation(
    sides: _Pair, results: Sequence[Tensor], tables: Sequence[Tensor], weights: _Pair, options: _Options, inverse: bool
) -> None:
    """Rotate each side into its result, after the norm unless options.eps is None."""
    sides = [_adjacent(x) for x in sides]
    if all(x is None for x in sides):
        return
    plan = _plan(sides, sides, options)
    outputs = [None if x is None else y for x, y in zip(sides, results, strict=True)]
    read, scalars, switches = _shared((*sides, *outputs), tables, weights, options)
    launch(
        rotary_kernel,
        (plan.walkers * sum(plan.groups),),
        (
            *(*_present(sides), *read),
            *_present(outputs),
            *(plan.time, *plan.heads, *plan.groups, plan.group_heads, *scalars),
        ),
        num_warps=plan.num_warps,
        **plan.sizes,
        **switches,
        INVERSE=inverse,
        NORM=options.eps is not None,
        ACC=accumulator(results[0].dtype)[1],
    )


def _shared(
    tensors: _Pair, tables: Sequence[Tensor], weights: _Pair, options: _Options
) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """(tables and weights, strides and scalars, constexprs): what both kernels take alike."""
    cos, sin, table_unit, table_strides = _tables(*tables)
    unit, strides = _strides(tensors, options.heads_axis)
    scalars = [*strides, *table_strides, options.eps or 0.0, options.weight_offset]
    switches = {"UNIT": unit, "TABLE_UNIT": table_unit, "FULL": cos.shape[-1] == options.rotated}
    switches |= {"HAS_WQ": weights[0] is not None, "HAS_WK": weights[1] is not None}
    return [cos, sin, *_weights(weights, cos)], scalars, switches


def _present(pair: _Pair) -> list[Tensor]:
    """The pair, a missing side's tensor replaced by the other's, which stands there unread."""
    other = next(x for x in pair if x is not None)
    return [other if x is None else x for x in pair]


def _weights(weights: _Pair, other: Tensor) -> list[Tensor]:
    """Both in one dtype, as the kernels select between them."""
    present = [w for w in weights if w is not None]
    if len({w.dtype for w in present}) > 1:
        weights = [w.to(accumulator(other.dtype)[0]) for w in present]
    return [w.contiguous() for w in _present(weights)] if present else [other, other]


def _launch_forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    results = _fake_forward(q, k)
    _launch_rotation((q, k), results, (cos, sin), (q_weight, k_weight), _Options(*options), inverse=False)
    return results


def _fake_forward(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(q), _like(k)


def _launch_backward(
    cos: Tensor,
    sin: Tensor,
    dyq: Tensor | None,
    dyk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dq_weight, dk_weight), those not in `needs` empty; q and k only where they were normed."""
    *options, needs = rest
    grads = _fake_backward(cos, sin, dyq, dyk, q, k, q_weight, k_weight, *rest)
    upstream = [dy if needs[i] or needs[i + 2] else None for i, dy in enumerate((dyq, dyk))]
    weights = (q_weight, k_weight)
    if q is None or k is None:
        _launch_rotation(upstream, grads[:2], (cos, sin), weights, _Options(*options), inverse=True)
    else:
        _launch_norm_backward(upstream, (q, k), (cos, sin), weights, _Options(*options), grads, needs)
    return grads


def _launch_norm_backward(
    upstream: _Pair,
    inputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    weights: _Pair,
    options: _Options,
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> None:
    """Fill `grads`, the gradients of q, k and their weights, where `needs` says so."""
    upstream = [_adjacent(dy) for dy in upstream]
    if all(dy is None for dy in upstream):
        for dw in grads[2:]:
            dw.zero_()
        return
    sides = [None if dy is None else _adjacent(x) for dy, x in zip(upstream, inputs, strict=True)]
    results = _written(sides, grads, needs)
    need_dw = any(needs[2:])
    plan = _plan(sides, inputs, options, summed=need_dw)
    read, scalars, switches = _shared((*upstream, *sides, *results), tables, weights, options)
    asked_for = configs.registers_asked_for(_runtime.architecture(inputs[0].device))
    programs, (acc, tl_acc) = plan.walkers * sum(plan.groups), accumulator(inputs[0].dtype)
    partial = torch.empty((programs if need_dw else 0, plan.sizes["D"]), dtype=acc, device=inputs[0].device)
    launch(
        rotary_norm_backward_kernel,
        (programs,),
        (
            *(*_present(upstream), *_present(sides), *read),
            *(*_present(results), partial),
            *(plan.time, plan.blocks, -(-plan.blocks // plan.walkers)),
            *(*plan.heads, *plan.groups, plan.group_heads, *scalars),
        ),
        num_warps=plan.num_warps,
        max_registers=configs.ROTARY_SUM_REGISTERS if need_dw else asked_for,
        **plan.sizes,
        **switches,
        HAS_DW=need_dw,
        ACC=tl_acc,
    )
    parts = partial.split([plan.walkers * count for count in plan.groups]) if need_dw else (partial, partial)
    sum_partials(*[sums for sums, need in zip(zip(parts, grads[2:], strict=True), needs[2:], strict=True) if need])


def _written(sides: _Pair, grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Where the kernel puts dx, which it always forms: nowhere to be seen if the weight's gradient alone is wanted."""
    pairs = zip(sides, grads, needs, strict=False)
    return [None if x is None else dx if need else _like(x) for x, dx, need in pairs]


def _fake_backward(
    cos: Tensor,
    sin: Tensor,
    dyq: Tensor | None,
    dyk: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_q, need_k, need_wq, need_wk = rest[-1]
    other = dyq if dyq is not None else dyk
    assert other is not None

    def like(x: Tensor | None, dy: Tensor | None, need: bool) -> Tensor:
        source = dy if x is None else x
        return _like(source) if need and source is not None else other.new_empty(0)

    def vector(weight: Tensor | None, need: bool) -> Tensor:
        return torch.empty_like(weight) if need and weight is not None else other.new_empty(0)

    return like(q, dyq, need_q), like(k, dyk, need_k), vector(q_weight, need_wq), vector(k_weight, need_wk)


# Operators and autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, cos, sin, q_weight, k_weight, *options = inputs
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    # Neither side depends on the other's inputs.
    ctx.mark_non_differentiable(*(y for side, y in enumerate(output) if not (needs[side] or needs[4 + side])))
    ctx.options = _Options(*options)
    normed = ctx.options.eps is not None
    ctx.save_for_backward(cos, sin, *((q, k, q_weight, k_weight) if normed else (None,) * 4))


def _backward(ctx: Any, dyq: Tensor | None, dyk: Tensor | None) -> tuple[Any, ...]:
    cos, sin, *saved = ctx.saved_tensors
    need_q, need_k, _, _, need_wq, need_wk = ctx.needs_input_grad[:6]
    used = (dyq is not None, dyk is not None) * 2
    needs = [need and use for need, use in zip((need_q, need_k, need_wq, need_wk), used, strict=True)]
    rest = (None,) * len(ctx.options)
    if not any(needs):
        return (None,) * 6 + rest
    grads = rotary_backward(cos, sin, dyq, dyk, *saved, *ctx.options, needs)
    dq, dk, dwq, dwk = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return (dq, dk, None, None, dwq, dwk, *rest)


_OPTIONS = "int heads_axis, SymInt rotated, bool interleaved, float? eps, float weight_offset"
rotary_forward = Operator(
    "rotary_forward(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight,"
    f" {_OPTIONS}) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
rotary_backward = Operator(
    "rotary_backward(Tensor cos, Tensor sin, Tensor? dyq, Tensor? dyk, Tensor? q, Tensor? k, Tensor? q_weight,"
    f" Tensor? k_weight, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


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


# Public function.


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
    heads_axis, rotated = _check_shapes(q, k, cos, sin, head_dim_axis, rotary_dim)
    _check_norm(q, q_weight, k_weight, qk_norm_eps, weight_offset)
    obstacle = _obstacle(q, k, cos, sin, q_weight, k_weight)
    if _runtime.choose(q, k, cos, sin, q_weight, k_weight, obstacle=obstacle):
        eps = None if qk_norm_eps is None else float(qk_norm_eps)
        options = _Options(heads_axis, rotated, interleaved, eps, float(weight_offset))
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
