"""Attention's forward: online softmax over tiles of keys; few queries against many keys in parts, then joined."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _runtime, configs
from .._rows import accumulator
from .._runtime import kernel, tl
from ._launch import (
    Extras,
    Options,
    config_of,
    documents_of,
    empty_like,
    grid_of,
    pointers_of,
    power_of_2,
    readable,
    scalars_of,
    sizes_of,
    stepping,
    steps_of,
    strides_of,
    switches_of,
    unit_of,
)
from ._tiles import VARYING, capped, kept_by, lengths, load_tile, place, seen_by, tile_range


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
        higher = tl.maximum(top, tl.max(s, 1) * factor)
        base = higher
        if MASKED or HAS_MASK or HAS_KEY_MASK:
            # A row that has seen nothing yet: -inf - -inf would be NaN.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if HAS_DROPOUT:
            p = tl.where(kept_by(seed, head, rows, cols[None, :], dropout), p, 0.0)
        if DESCRIPTORS:
            v = v_at.load([start, 0])
        else:
            v = load_tile(v_at + start * stride_vs, (cols < S)[:, None], e_ok, MASKED, E != BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = higher
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
        seed = tl.load(SEED)
    dropout_head = batch * heads + head
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


@kernel(do_not_specialize=VARYING)
def attention_combine_kernel(
    PARTIAL,
    PARTIAL_LSE,
    OUT,
    LSE,
    T,
    heads,
    rows_of_heads,
    splits,
    stride_ob,
    stride_oh,
    stride_ot,
    BLOCK_M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """out = sum over splits of 2^lse_i out_i / sum of 2^lse_i, always in the same order."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.cast(rows_of_heads, tl.int64) * T
    rows_ok = rows < count
    e = tl.arange(0, BLOCK_E)
    ok = rows_ok[:, None] & (e < E)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_E], dtype=ACC)
    total = tl.zeros([BLOCK_M], dtype=ACC)
    top = tl.full([BLOCK_M], float("-inf"), dtype=ACC)
    for split in range(splits):
        at = split * count + rows
        lse = tl.load(PARTIAL_LSE + at, mask=rows_ok, other=float("-inf"))
        part = tl.load(PARTIAL + at[:, None] * E + e[None, :], mask=ok, other=0.0)
        higher = tl.maximum(top, lse)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, weight = tl.exp2(top - base), tl.exp2(lse - base)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + part * weight[:, None]
        top = higher
    norm = tl.where(total == 0.0, 1.0, total)
    row, t = rows // T, rows % T
    out_at = OUT + ((row // heads) * stride_ob + (row % heads) * stride_oh + t * stride_ot)[:, None] * UNIT
    tl.store(out_at + e[None, :], (acc / norm[:, None]).to(OUT.dtype.element_ty), mask=ok)
    if SAVE_LSE:
        tl.store(LSE + rows, tl.where(total == 0.0, float("-inf"), top + tl.log2(norm)), mask=rows_ok)


class _Work(NamedTuple):
    """How a forward launch is cut into programs, in the kernel's order."""

    heads: int  # that have programs of their own: of queries, or of keys when the queries of a group go together
    group: int
    tiles: int
    rows: int  # heads in all batches
    section: int
    splits: int = 1
    chunk: int = 0


def launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), lse in units of log2, empty if it is not asked for."""
    extras, options, save_lse = stepping(Extras(*rest[:6])), Options(*rest[6:-1]), rest[-1]
    out, lse = fake_forward(q, k, v, *rest)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0 or extras.cu_q is not None:
        # What belongs to no document is never written.
        out.zero_()
        lse.fill_(-math.inf)
    if k.numel() == 0:
        return out, lse
    q, k, v = readable(q), readable(k), readable(v)
    if _few_queries(q, k, extras, options):
        _launch_decode((q, k, v, out, lse), extras, options, save_lse)
        return out, lse
    config = config_of(configs.ATTENTION_FORWARD, configs.ATTENTION_FP32, q, v, _most(extras))
    if not _describable(config, (q, k, v), extras):
        config = configs.by_pointers(config)
    batch, longest, keys = documents_of(q, k, extras, options)
    group = q.shape[1] // k.shape[1]
    key_bytes = keys * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = grid_of(batch, q.shape[1], longest, config.block_m, group, key_bytes)
    work = _Work(q.shape[1], group, tiles, rows, section)
    _run_forward((q, k, v, out, lse), extras, options, work, config, save_lse)
    return out, lse


def _most(extras: Extras) -> dict[str, tuple[int, int]] | None:
    """What limits the tile of wide heads."""
    if extras.mask is not None:
        return configs.ATTENTION_FORWARD_MASKED
    return None if extras.key_mask is None else configs.ATTENTION_FORWARD_PADDED


def _describable(config: configs.AttentionConfig, tensors: tuple[Tensor, ...], extras: Extras) -> bool:
    """Whether the tiles can be loaded as the configuration says: descriptors want rows on 16-byte boundaries.

    Warps that only load cannot load masks, which have no descriptors.
    """
    if config.loads == "specialized" and (extras.mask is not None or extras.key_mask is not None):
        return False
    rows = (x.shape[-1] % unit_of(x) == 0 and steps_of(x)[2] >= x.shape[-1] for x in tensors)
    return config.loads == "pointers" or (tensors[0].itemsize == 2 and all(rows))


def _run_forward(
    tensors: tuple[Tensor, ...],
    extras: Extras,
    options: Options,
    work: _Work,
    config: configs.AttentionConfig,
    save_lse: bool,
    split: bool = False,
    stride_split: int = 0,
) -> None:
    """Launch the forward kernel on q, k, v, out, lse."""
    q, k, v, out, lse = tensors
    unit, strides = strides_of(q, k, v, out)
    descriptors, specialized = config.loads != "pointers", config.loads == "specialized"
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
        num_warps=config.num_warps,
        max_registers=None if specialized else configs.ATTENTION_REGISTERS,
        scratch=descriptors,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **sizes_of(q, v),
        UNIT=unit,
        STAGES=config.num_stages,
        DESCRIPTORS=descriptors,
        SPECIALIZED=specialized,
        **switches_of(extras, options),
        SPLIT=split,
        SAVE_LSE=save_lse,
        ACC=accumulator(q.dtype)[1],
    )


def _few_queries(q: Tensor, k: Tensor, extras: Extras, options: Options) -> bool:
    """Whether all queries of a group of heads fit one small tile against keys long enough to be split."""
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    few = rows <= configs.ATTENTION_DECODE_ROWS and k.shape[2] >= configs.ATTENTION_DECODE_KEYS
    return few and extras.cu_q is None and options.dropout == 0.0


def _launch_decode(tensors: tuple[Tensor, ...], extras: Extras, options: Options, save_lse: bool) -> None:
    """Few queries, many keys: a program for each chunk of the keys, then their results by their log-sum-exps."""
    q, k, v, out, lse = tensors
    (B, H, T, _), Hk, S, E = q.shape, k.shape[1], k.shape[2], v.shape[-1]
    config = config_of(configs.ATTENTION_DECODE, configs.ATTENTION_FP32, q, v)
    config = replace(config, block_m=power_of_2(T * (H // Hk)))
    blocks = -(-S // config.block_n)
    wanted = -(-configs.ATTENTION_DECODE_PROGRAMS * _runtime.multiprocessors(q.device) // (B * Hk))
    each = -(-blocks // min(blocks, wanted))
    splits = -(-blocks // each)
    work = _Work(Hk, H // Hk, 1, B * Hk, B * Hk, splits, each * config.block_n)
    if splits == 1:
        _run_forward(tensors, extras, options, work, config, save_lse, split=True)
        return
    acc, tl_acc = accumulator(q.dtype)
    partial, partial_lse = (
        torch.empty(shape, dtype=acc, device=q.device) for shape in ((splits * B, H, T, E), (splits * B, H, T))
    )
    _run_forward((q, k, v, partial, partial_lse), extras, options, work, config, True, True, B * H * T * E)
    unit, strides = strides_of(out)
    sizes = sizes_of(q, v)
    _runtime.launch(
        attention_combine_kernel,
        (-(-B * H * T // configs.ATTENTION_COMBINE_ROWS),),
        (partial, partial_lse, out, lse, T, H, B * H, splits, *strides),
        num_warps=4,
        BLOCK_M=configs.ATTENTION_COMBINE_ROWS,
        E=E,
        BLOCK_E=sizes["BLOCK_E"],
        UNIT=unit,
        SAVE_LSE=save_lse,
        ACC=tl_acc,
    )


def fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3] if rest[-1] else (0,), dtype=accumulator(q.dtype)[0], device=q.device)
    return empty_like(q, v.shape[-1]), lse
