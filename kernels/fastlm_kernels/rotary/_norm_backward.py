"""The backward through rotation and norm: dx, and the sums that weights' gradients are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator, sum_partials
from .._runtime import kernel, launch, tl
from ._launch import Options, Pair, adjacent, both_of, empty_like, plan_of, shared
from ._tiles import _VARYING, _load_pairs, _load_table, _load_weight, _rest, _store_pairs, _turn


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


def launch_norm_backward(
    upstream: Pair,
    inputs: Sequence[Tensor],
    tables: Sequence[Tensor],
    weights: Pair,
    options: Options,
    grads: Sequence[Tensor],
    needs: Sequence[bool],
) -> None:
    """Fill `grads`, the gradients of q, k and their weights, where `needs` says so."""
    upstream = [adjacent(dy) for dy in upstream]
    if all(dy is None for dy in upstream):
        for dw in grads[2:]:
            dw.zero_()
        return
    sides = [None if dy is None else adjacent(x) for dy, x in zip(upstream, inputs, strict=True)]
    results = _written(sides, grads, needs)
    need_dw = any(needs[2:])
    plan = plan_of(sides, inputs, options, summed=need_dw)
    read, scalars, switches = shared((*upstream, *sides, *results), tables, weights, options)
    asked_for = configs.registers_asked_for(_runtime.architecture(inputs[0].device))
    programs, (acc, tl_acc) = plan.walkers * sum(plan.groups), accumulator(inputs[0].dtype)
    partial = torch.empty((programs if need_dw else 0, plan.sizes["D"]), dtype=acc, device=inputs[0].device)
    launch(
        rotary_norm_backward_kernel,
        (programs,),
        (
            *(*both_of(upstream), *both_of(sides), *read),
            *(*both_of(results), partial),
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


def _written(sides: Pair, grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Where the kernel puts dx, which it always forms: nowhere to be seen if the weight's gradient alone is wanted."""
    pairs = zip(sides, grads, needs, strict=False)
    return [None if x is None else dx if need else empty_like(x) for x, dx, need in pairs]
