"""The rotation, with the norm before it or without; by -sin it is the backward of one without a norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._rows import accumulator
from .._runtime import kernel, launch, tl
from ._launch import Options, Pair, adjacent, both_of, plan_of, shared
from ._tiles import _VARYING, _load_pairs, _load_table, _load_weight, _rest, _store_pairs, _turn


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


def launch_rotation(
    sides: Pair, results: Sequence[Tensor], tables: Sequence[Tensor], weights: Pair, options: Options, inverse: bool
) -> None:
    """Rotate each side into its result, after the norm unless options.eps is None."""
    sides = [adjacent(x) for x in sides]
    if all(x is None for x in sides):
        return
    plan = plan_of(sides, sides, options)
    outputs = [None if x is None else y for x, y in zip(sides, results, strict=True)]
    read, scalars, switches = shared((*sides, *outputs), tables, weights, options)
    launch(
        rotary_kernel,
        (plan.walkers * sum(plan.groups),),
        (
            *(*both_of(sides), *read),
            *both_of(outputs),
            *(plan.time, *plan.heads, *plan.groups, plan.group_heads, *scalars),
        ),
        num_warps=plan.num_warps,
        **plan.sizes,
        **switches,
        INVERSE=inverse,
        NORM=options.eps is not None,
        ACC=accumulator(results[0].dtype)[1],
    )
