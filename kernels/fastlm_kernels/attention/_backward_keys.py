"""Attention's backward by tiles of keys: dk and dv, and dq by atomics if it need not repeat bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

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
from ._tiles import (
    VARYING,
    alone,
    document,
    finite,
    kept_by,
    lengths,
    load_tile,
    place,
    score_gradient,
    tile_range,
    weights_of,
)


@kernel(do_not_specialize=VARYING)
def attention_dkdv_kernel(
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
    DK,
    DV,
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
    stride_dkb,
    stride_dkh,
    stride_dks,
    stride_dvb,
    stride_dvh,
    stride_dvs,
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
    HAS_DQ: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv of one tile of keys of one head of keys, over the queries of all heads that read it, in order.

    HAS_DLSE  DELTA holds the log-sum-exp's gradient, which a lone key has too
    HAS_DQ    the tile's part of dq too, added to DQ, dense, by atomics
    """
    tile, batch, key_head = place(tl.program_id(0), tiles, rows_of_heads, heads, section, False)
    total_k = S
    begin_q, begin_k, at_batch, T, S, stored, shift = lengths(
        CU_Q, CU_K, USED_K, batch, T, S, BOTTOM_RIGHT, PACKED, USED
    )
    sight = (S, shift, left, right)
    start = tile * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    cols_ok = (cols < S)[:, None]
    wide_cols = cols.to(tl.int64)[:, None] + begin_k
    d, e, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_M)
    stride_qt, stride_dot = tl.cast(stride_qt, tl.int64) * UNIT, tl.cast(stride_dot, tl.int64) * UNIT
    stride_mt = tl.cast(stride_mt, tl.int64)
    stride_ws = tl.cast(stride_ws, tl.int64)
    wide_head = tl.cast(key_head, tl.int64)
    k_at = K + (at_batch * stride_kb + wide_head * stride_kh + wide_cols * stride_ks) * UNIT + d[None, :]
    v_at = V + (at_batch * stride_vb + wide_head * stride_vh + wide_cols * stride_vs) * UNIT + e[None, :]
    k = load_tile(k_at, cols_ok, (d < D)[None, :], True, D != BLOCK_D)
    v = load_tile(v_at, cols_ok, (e < E)[None, :], True, E != BLOCK_E)
    key_mask = KEY_MASK + at_batch * stride_wb
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEED + tl.cast(batch, tl.int64) * stride_seed)

    # One loop over the tiles of queries of one head after another: the next head's are on their way while the last
    # one's are summed, and one body holds fewer registers than one for whole tiles and one for edges.
    first, full, edge, stop = tile_range(start, S, T, -shift, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
    count = tl.maximum(tl.cdiv(stop - first, BLOCK_M), 0)
    q_at = Q + at_batch * stride_qb * UNIT + begin_q * stride_qt + (m[None, :] * stride_qt + d[:, None])
    do_at = DO + at_batch * stride_dob * UNIT + begin_q * stride_dot + (m[:, None] * stride_dot + e[None, :])
    rows_at = at_batch * (heads * group) * total_q + begin_q
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_E], dtype=ACC)
    for step in tl.range(0, group * count, num_stages=STAGES):
        head = key_head * group + step // count
        wide_head = tl.cast(head, tl.int64)
        begin = first + step % count * BLOCK_M
        rows = begin + m
        rows_ok = rows < T
        at = rows_at + wide_head * total_q + begin
        q_tile = q_at + wide_head * stride_qh * UNIT + begin * stride_qt
        q = load_tile(q_tile, (d < D)[:, None], rows_ok[None, :], D != BLOCK_D, True)
        s = tl.dot(k, q, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        lse = tl.load(LSE + at + m, mask=rows_ok, other=float("-inf"))
        on_edge = (begin < full) | (begin >= edge)
        p, slope = weights_of(
            s,
            finite(lse)[None, :],
            rows[None, :],
            rows_ok[None, :],
            cols[:, None],
            sight,
            MASK + at_batch * stride_mb + wide_head * stride_mh + rows.to(tl.int64)[None, :] * stride_mt,
            key_mask,
            stride_ws,
            scale,
            softcap,
            on_edge,
            True,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_MASK,
            MASK_STEP,
            HAS_KEY_MASK,
            HAS_SOFTCAP,
        )
        do_tile = do_at + wide_head * stride_doh * UNIT + begin * stride_dot
        do = load_tile(do_tile, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E)
        if HAS_DROPOUT:
            # The sign says what is dropped: a mask beside the weights would take registers of its own.
            p = tl.where(kept_by(seed, head, rows[None, :], cols[:, None], dropout), p, -p)
        if HAS_DV:
            # dv = (p kept)^T do
            weights = p
            if HAS_DROPOUT:
                weights = tl.where(p < 0.0, 0.0, p)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee", out_dtype=ACC)
        if HAS_DK or HAS_DQ:
            delta = tl.load(DELTA + at + m, mask=rows_ok, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=ACC)
            ds = score_gradient(p, dp, delta[None, :], slope, dropout, HAS_SOFTCAP, HAS_DROPOUT)
            if not HAS_DLSE and (on_edge or S == 1):
                ds = tl.where(alone(rows, sight, HAS_LEFT, HAS_RIGHT)[None, :], 0.0, ds)
            ds = ds.to(q.dtype)
        if HAS_DK:
            # dk = ds^T q
            dk = tl.dot(ds, tl.trans(q), dk, input_precision="ieee", out_dtype=ACC)
        if HAS_DQ:
            # dq^T = k^T ds^T, added to what the programs of other keys give, in the order in which they come
            part = tl.dot(tl.trans(k), ds, input_precision="ieee", out_dtype=ACC) * scale
            dq_tile = DQ + at * D + (m[None, :] * D + d[:, None])
            tl.atomic_add(dq_tile, part, mask=(d < D)[:, None] & rows_ok[None, :], sem="relaxed")
    if PACKED:
        # Read again: kept through the loop they would take registers that are scarce there.
        begin_k, stored = document(CU_K, batch, total_k, True)
        wide_cols = cols.to(tl.int64)[:, None] + begin_k
    # Keys of a document past those in use get 0, not what lay there.
    stored_ok = (cols < stored)[:, None]
    if HAS_DK:
        dk_at = DK + (at_batch * stride_dkb + tl.cast(key_head, tl.int64) * stride_dkh + wide_cols * stride_dks) * UNIT
        dk = tl.where(cols_ok, dk * scale, 0.0)
        tl.store(dk_at + d[None, :], dk.to(DK.dtype.element_ty), mask=stored_ok & (d < D)[None, :])
    if HAS_DV:
        dv_at = DV + (at_batch * stride_dvb + tl.cast(key_head, tl.int64) * stride_dvh + wide_cols * stride_dvs) * UNIT
        if HAS_DROPOUT:
            dv = dv / (1.0 - dropout)
        dv = tl.where(cols_ok, dv, 0.0)
        tl.store(dv_at + e[None, :], dv.to(DV.dtype.element_ty), mask=stored_ok & (e < E)[None, :])


def _most(extras: Extras, has_dlse: bool, one_pass: bool) -> configs.AttentionTiles | None:
    """What limits the tile of wide heads."""
    if not one_pass:
        packed = None if extras.cu_k is None else configs.ATTENTION_DKDV_PACKED
        return packed if extras.mask is None else configs.ATTENTION_DKDV_MASKED
    # With the log-sum-exp's gradient one pass over full tiles of 128 channels spills 48 bytes on sm_90.
    if extras.mask is not None or has_dlse:
        return configs.ATTENTION_ONE_PASS_MASKED
    return None if extras.seed is None else configs.ATTENTION_ONE_PASS_DROPOUT


def launch_keys(
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    extras: Extras,
    options: Options,
    needs: Sequence[bool],
    has_dlse: bool,
    dq_sums: Tensor | None = None,
) -> None:
    """dk and dv of `grads` as `needs` says; with `dq_sums`, dense zeros, dq is added to them."""
    q, k, v, do, _, _ = inputs
    table = configs.ATTENTION_DKDV if dq_sums is None else configs.ATTENTION_ONE_PASS
    config = config_of(table, configs.ATTENTION_FP32, q, v, _most(extras, has_dlse, dq_sums is not None))
    batch, queries, keys = documents_of(q, k, extras, options)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    query_bytes = group * queries * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = grid_of(batch, heads, keys, config.block_n, 1, query_bytes)
    dk, dv = (grad if need else like for grad, need, like in zip(grads[1:], needs[1:], (k, v), strict=True))
    unit, strides = strides_of(q, k, v, do, dk, dv)
    _runtime.launch(
        attention_dkdv_kernel,
        (tiles * rows,),
        (
            *(*inputs, *pointers_of(extras, q)),
            *(q if dq_sums is None else dq_sums, grads[1], grads[2]),
            *(q.shape[2], k.shape[2], q.shape[2], heads, group, tiles, rows, section),
            *(*strides, *scalars_of(extras, options)),
        ),
        **launch_options(config, q, v, unit),
        **switches_of(extras, options),
        HAS_DLSE=has_dlse,
        HAS_DQ=dq_sums is not None,
        HAS_DK=needs[1],
        HAS_DV=needs[2],
    )
