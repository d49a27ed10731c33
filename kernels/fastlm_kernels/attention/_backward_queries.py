"""Attention's backward by tiles of queries: dq, summed by one program in one order."""

from __future__ import annotations

from torch import Tensor

from .. import _runtime, configs
from .._runtime import kernel, tl
from ._launch import (
    Extras,
    Options,
    config_of,
    documents_of,
    grid_of,
    launch_options,
    pointers_of,
    scalars_of,
    strides_of,
    switches_of,
)
from ._tiles import VARYING, alone, finite, kept_by, lengths, load_tile, place, score_gradient, tile_range, weights_of


@kernel()
def _gather_keys(
    dq,
    q,
    do,
    delta,
    lse,
    k_at,
    v_at,
    begin,
    end,
    rows,
    rows_ok,
    sight,
    stride_ks,
    stride_vs,
    mask_rows,
    key_mask,
    stride_ws,
    scale,
    softcap,
    seed,
    head,
    dropout,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add what the keys begin .. end give to dq of one tile of queries."""
    S = sight[0]
    d_ok, e_ok = (tl.arange(0, BLOCK_D) < D)[:, None], (tl.arange(0, BLOCK_E) < E)[:, None]
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # type: ignore[attr-defined]
        cols = start + tl.arange(0, BLOCK_N)
        cols_ok = (cols < S)[None, :]
        k = load_tile(k_at + start * stride_ks, d_ok, cols_ok, D != BLOCK_D, MASKED)
        v = load_tile(v_at + start * stride_vs, e_ok, cols_ok, E != BLOCK_E, MASKED)
        s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        p, slope = weights_of(
            s,
            lse,
            rows,
            rows_ok,
            cols[None, :],
            sight,
            mask_rows,
            key_mask,
            stride_ws,
            scale,
            softcap,
            MASKED,
            MASKED,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_MASK,
            MASK_STEP,
            HAS_KEY_MASK,
            HAS_SOFTCAP,
        )
        if HAS_DROPOUT:
            p = tl.where(kept_by(seed, head, rows, cols[None, :], dropout), p, -p)
        dp = tl.dot(do, v, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        ds = score_gradient(p, dp, delta, slope, dropout, HAS_SOFTCAP, HAS_DROPOUT)
        if MASKED and not HAS_DLSE:
            ds = tl.where(alone(rows, sight, HAS_LEFT, HAS_RIGHT), 0.0, ds)
        # dq = ds k
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
    return dq


@kernel(do_not_specialize=VARYING)
def attention_dq_kernel(
    Q,
    K,
    V,
    DO,
    DELTA,
    LSE,
    MASK,
    KEY_MASK,
    CU_Q,
    CU_K,
    USED_K,
    SEED,
    DQ,
    T,
    S,
    total_q,
    heads,
    group,
    tiles,
    rows_of_heads,
    section,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    stride_mb,
    stride_mh,
    stride_mt,
    stride_wb,
    stride_ws,
    stride_seed,
    left,
    right,
    scale,
    softcap,
    dropout,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PACKED: tl.constexpr,
    USED: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dq of one tile of queries of one head; with HAS_DLSE, DELTA holds the log-sum-exp's gradient too."""
    tile, batch, head = place(tl.program_id(0), tiles, rows_of_heads, heads, section, HAS_RIGHT)
    begin_q, begin_k, at_batch, T, S, _, shift = lengths(CU_Q, CU_K, USED_K, batch, T, S, BOTTOM_RIGHT, PACKED, USED)
    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    rows_ok = rows < T
    wide_rows = rows.to(tl.int64)[:, None]
    d, e, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    stride_ks, stride_vs = tl.cast(stride_ks, tl.int64) * UNIT, tl.cast(stride_vs, tl.int64) * UNIT
    stride_ws = tl.cast(stride_ws, tl.int64)
    wide_head, key_head = tl.cast(head, tl.int64), tl.cast(head // group, tl.int64)
    q_at = Q + (at_batch * stride_qb + wide_head * stride_qh + (begin_q + wide_rows) * stride_qt) * UNIT
    do_at = DO + (at_batch * stride_dob + wide_head * stride_doh + (begin_q + wide_rows) * stride_dot) * UNIT
    k_at = K + (at_batch * stride_kb + key_head * stride_kh) * UNIT + begin_k * stride_ks
    k_at += n[None, :] * stride_ks + d[:, None]
    v_at = V + (at_batch * stride_vb + key_head * stride_vh) * UNIT + begin_k * stride_vs
    v_at += n[None, :] * stride_vs + e[:, None]
    mask_rows = MASK + at_batch * stride_mb + wide_head * stride_mh + wide_rows * stride_mt
    key_mask = KEY_MASK + at_batch * stride_wb
    row = (at_batch * heads + head) * total_q + begin_q
    q = load_tile(q_at + d[None, :], rows_ok[:, None], (d < D)[None, :], True, D != BLOCK_D)
    do = load_tile(do_at + e[None, :], rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E)
    delta = tl.load(DELTA + row + rows, mask=rows_ok, other=0.0)
    lse = finite(tl.load(LSE + row + rows, mask=rows_ok, other=float("-inf")))
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEED + tl.cast(batch, tl.int64) * stride_seed)

    first, full, edge, stop = tile_range(start, T, S, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)
    for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
        dq = _gather_keys(
            dq,
            q,
            do,
            delta[:, None],
            lse[:, None],
            k_at,
            v_at,
            first if phase == 0 else (full if phase == 1 else edge),
            full if phase == 0 else (edge if phase == 1 else stop),
            rows[:, None],
            rows_ok[:, None],
            (S, shift, left, right),
            stride_ks,
            stride_vs,
            mask_rows,
            key_mask,
            stride_ws,
            scale,
            softcap,
            seed,
            head,
            dropout,
            BLOCK_N,
            D,
            E,
            BLOCK_D,
            BLOCK_E,
            STAGES,
            phase != 1,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_MASK,
            MASK_STEP,
            HAS_KEY_MASK,
            HAS_SOFTCAP,
            HAS_DROPOUT,
            HAS_DLSE,
            ACC,
        )
    dq_at = DQ + (at_batch * stride_dqb + wide_head * stride_dqh + (begin_q + wide_rows) * stride_dqt) * UNIT
    tl.store(dq_at + d[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=rows_ok[:, None] & (d < D)[None, :])


def launch_queries(inputs: tuple[Tensor, ...], dq: Tensor, extras: Extras, options: Options, has_dlse: bool) -> None:
    q, k, v, do, _, _ = inputs
    most = None if extras.mask is None else configs.ATTENTION_DQ_MASKED
    config = config_of(configs.ATTENTION_DQ, configs.ATTENTION_DQ_FP32, q, v, most)
    batch, queries, keys = documents_of(q, k, extras, options)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    key_bytes = keys * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = grid_of(batch, heads, queries, config.block_m, group, key_bytes)
    unit, strides = strides_of(q, k, v, do, dq)
    _runtime.launch(
        attention_dq_kernel,
        (tiles * rows,),
        (
            *(*inputs, *pointers_of(extras, q)),
            dq,
            *(q.shape[2], k.shape[2], q.shape[2], heads, group, tiles, rows, section),
            *(*strides, *scalars_of(extras, options)),
        ),
        **launch_options(config, q, v, unit),
        **switches_of(extras, options),
        HAS_DLSE=has_dlse,
    )
