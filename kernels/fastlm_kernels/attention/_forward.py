"""Attention's forward: online softmax over tiles of keys; few queries against many keys in parts, then joined."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .. import _runtime, configs
from .._runtime import kernel, tl
from ._launch import (
    Extras,
    Options,
    launch_options,
    pointers_of,
    scalars_of,
    strides_of,
    switches_of,
)
from ._tiles import VARYING, capped, kept_by, lengths, load_tile, place, seen_by, softmax_step, tile_range


@kernel()
def _attend(
    acc,
    total,
    top,
    q,
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
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Online softmax over the keys begin .. end of one tile of queries: (sum of p v, sum of p, largest score).

    k_at and v_at are pointers to the first tile, or with DESCRIPTORS descriptors of all keys, 0 past the end.
    """
    d_ok, e_ok = (tl.arange(0, BLOCK_D) < D)[:, None], (tl.arange(0, BLOCK_E) < E)[None, :]
    S = sight[0]
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES, warp_specialize=SPECIALIZED):  # type: ignore[attr-defined]
        cols = start + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            k = tl.trans(k_at.load([start, 0]))
        else:
            k = load_tile(k_at + start * stride_ks, d_ok, (cols < S)[None, :], D != BLOCK_D, MASKED)
        s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        factor = scale * 1.4426950408889634
        if HAS_SOFTCAP:
            s, _ = capped(s, scale, softcap)
            factor = 1.0
        if MASKED or HAS_MASK or HAS_KEY_MASK:
            seen = seen_by(
                rows,
                rows_ok,
                cols[None, :],
                sight,
                mask_rows,
                key_mask,
                stride_ws,
                MASKED,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_MASK,
                MASK_STEP,
                HAS_KEY_MASK,
            )
            s = tl.where(seen, s, float("-inf"))
        p, shrink, total, top = softmax_step(s, total, top, factor, MASKED or HAS_MASK or HAS_KEY_MASK)
        if HAS_DROPOUT:
            p = tl.where(kept_by(seed, head, rows, cols[None, :], dropout), p, 0.0)
        if DESCRIPTORS:
            v = v_at.load([start, 0])
        else:
            v = load_tile(v_at + start * stride_vs, (cols < S)[:, None], e_ok, MASKED, E != BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
    return acc, total, top


@kernel(do_not_specialize=VARYING)
def attention_forward_kernel(
    Q,
    K,
    V,
    MASK,
    KEY_MASK,
    CU_Q,
    CU_K,
    USED_K,
    SEED,
    OUT,
    LSE,
    T,
    S,
    total_q,
    heads,
    group,
    tiles,
    rows_of_heads,
    section,
    splits,
    chunk,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_op,
    stride_ob,
    stride_oh,
    stride_ot,
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
    DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
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
    SPLIT: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of queries of one head; with SPLIT all queries of a group of heads against one chunk of the keys.

    DESCRIPTORS  tiles are loaded by the tensor memory accelerator, through descriptors made here: a descriptor made on
                 the host cannot be cut in two by the compiler when it gives each half of the queries its own warps
    SPECIALIZED  one warp group loads, the others compute; the compiler does so for a single loop only
    """
    program = tl.program_id(0)
    split = 0
    if SPLIT:
        split = program % splits
        program = program // splits
    tile, batch, head = place(program, tiles, rows_of_heads, heads, section, HAS_RIGHT)
    key_head = head // group
    if SPLIT:
        key_head = head
        head = head * group
    begin_q, begin_k, at_batch, T, S, _, shift = lengths(CU_Q, CU_K, USED_K, batch, T, S, BOTTOM_RIGHT, PACKED, USED)

    start = tile * BLOCK_M
    rows = start + tl.arange(0, BLOCK_M)
    rows_ok = rows < T
    group_rows = tl.zeros_like(rows)
    if SPLIT:
        # Row r is query r % T of head r // T of the group: its keys are read once for all heads.
        rows_ok = rows < T * group
        group_rows = rows // T
        rows = rows % T
    wide_rows = rows.to(tl.int64)[:, None]
    wide_group = group_rows.to(tl.int64)[:, None]
    d, e, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    stride_ks, stride_vs = tl.cast(stride_ks, tl.int64) * UNIT, tl.cast(stride_vs, tl.int64) * UNIT
    stride_ws = tl.cast(stride_ws, tl.int64)
    q_at = Q + (at_batch * stride_qb + tl.cast(head, tl.int64) * stride_qh + begin_q * stride_qt) * UNIT
    k_at = K + (at_batch * stride_kb + tl.cast(key_head, tl.int64) * stride_kh) * UNIT + begin_k * stride_ks
    v_at = V + (at_batch * stride_vb + tl.cast(key_head, tl.int64) * stride_vh) * UNIT + begin_k * stride_vs
    if DESCRIPTORS:
        stride_qt = tl.cast(stride_qt, tl.int64) * UNIT
        q_at = tl.make_tensor_descriptor(q_at, [T, D], [stride_qt, 1], [BLOCK_M, BLOCK_D])
        k_at = tl.make_tensor_descriptor(k_at, [S, D], [stride_ks, 1], [BLOCK_N, BLOCK_D])
        v_at = tl.make_tensor_descriptor(v_at, [S, E], [stride_vs, 1], [BLOCK_N, BLOCK_E])
        q = q_at.load([start, 0])
    else:
        q_at += (wide_rows * stride_qt + wide_group * stride_qh) * UNIT + d[None, :]
        k_at += n[None, :] * stride_ks + d[:, None]
        v_at += n[:, None] * stride_vs + e[None, :]
        q = load_tile(q_at, rows_ok[:, None], (d < D)[None, :], True, D != BLOCK_D)
    mask_rows = MASK + at_batch * stride_mb + tl.cast(head, tl.int64) * stride_mh
    mask_rows += wide_rows * stride_mt + wide_group * stride_mh
    key_mask = KEY_MASK + at_batch * stride_wb

    first, full, edge, stop = tile_range(start, T, S, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if SPLIT:
        low = split * chunk
        high = low + chunk
        first, full, edge = tl.maximum(first, low), tl.maximum(full, low), tl.maximum(edge, low)
        full, edge, stop = tl.minimum(full, high), tl.minimum(edge, high), tl.minimum(stop, high)
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEED + tl.cast(batch, tl.int64) * stride_seed)
    dropout_head = head
    if SPLIT:
        dropout_head = head + group_rows[:, None]
    # Edge tiles before, whole tiles, edge tiles after: one body, its masks only where they are needed.
    for phase in tl.static_range(2 if SPECIALIZED else (0 if HAS_LEFT else 1), 3):
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k_at,
            v_at,
            first if phase == 0 or SPECIALIZED else (full if phase == 1 else edge),
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
            dropout_head,
            dropout,
            BLOCK_N,
            D,
            E,
            BLOCK_D,
            BLOCK_E,
            STAGES,
            DESCRIPTORS,
            SPECIALIZED,
            phase != 1,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_MASK,
            MASK_STEP,
            HAS_KEY_MASK,
            HAS_SOFTCAP,
            HAS_DROPOUT,
            ACC,
        )
    # out = sum of p v / sum of p; a row that saw nothing has 0 / 1
    norm = tl.where(total == 0.0, 1.0, total)
    if HAS_DROPOUT:
        out = acc / (norm * (1.0 - dropout))[:, None]
    else:
        out = acc / norm[:, None]
    out_at = OUT + (at_batch * stride_ob + tl.cast(head, tl.int64) * stride_oh + begin_q * stride_ot) * UNIT
    out_at += (tl.cast(split, tl.int64) * stride_op + wide_rows * stride_ot + wide_group * stride_oh) * UNIT
    tl.store(out_at + e[None, :], out.to(OUT.dtype.element_ty), mask=rows_ok[:, None] & (e < E)[None, :])
    if SAVE_LSE:
        # lse = log2(sum of 2^s); -inf of nothing
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(norm))
        row_heads = heads
        if SPLIT:
            row_heads = heads * group
        lse_head = (at_batch + tl.cast(split, tl.int64) * (rows_of_heads // heads)) * row_heads + head
        lse_at = LSE + lse_head * total_q + begin_q
        tl.store(lse_at + group_rows.to(tl.int64) * total_q + rows, lse, mask=rows_ok)


class Work(NamedTuple):
    """How a forward launch is cut into programs, in the kernel's order."""

    heads: int  # that have programs of their own: of queries, or of keys when the queries of a group go together
    group: int
    tiles: int
    rows: int  # heads in all batches
    section: int
    splits: int = 1
    chunk: int = 0


def run_forward(
    tensors: tuple[Tensor, ...],
    extras: Extras,
    options: Options,
    work: Work,
    config: configs.AttentionConfig,
    save_lse: bool,
    split: bool = False,
    stride_split: int = 0,
) -> None:
    """Launch the forward kernel on q, k, v, out, lse."""
    q, k, v, out, lse = tensors
    unit, strides = strides_of(q, k, v, out)
    _runtime.launch(
        attention_forward_kernel,
        (work.tiles * work.rows * work.splits,),
        (
            *(q, k, v, *pointers_of(extras, q)),
            *(out, lse),
            *(q.shape[2], k.shape[2], q.shape[2], *work),
            *(*strides[:9], stride_split // unit, *strides[9:]),
            *scalars_of(extras, options),
        ),
        **launch_options(config, q, v, unit),
        scratch=config.loads != "pointers",
        DESCRIPTORS=config.loads != "pointers",
        SPECIALIZED=config.loads == "specialized",
        **switches_of(extras, options),
        SPLIT=split,
        SAVE_LSE=save_lse,
    )
