"""Attention: for each query a softmax over the keys it may see, and the mean of their values under it.

For one head, q (L, D), k (S, D), v (S, E), query i standing at position p_i among the keys:

    s_ij  = scale * q_i . k_j;   s_ij = softcap * tanh(s_ij / softcap) with a cap;   s_ij += mask_ij with a float mask
    j is visible to i   if   p_i - left <= j <= p_i + right,  j <= p_i when causal,  key_mask_j,  mask_ij
    lse_i = log sum_{visible j} exp(s_ij)
    out_i = sum_{visible j} exp(s_ij - lse_i) v_j;   0, with lse_i = -inf, where nothing is visible

    causal_align "top_left": p_i = i, as PyTorch's is_causal;  "bottom_right": p_i = i + S - L, the last query at the
    last key. It places the window too.

With the weights p_ij = exp(s_ij - lse_i) and the upstream gradients dout and dlse, the gradients are

    delta_i = dout_i . out_i - dlse_i
    ds_ij = p_ij (dout_i . v_j - delta_i);   times 1 - (s_ij / softcap)^2 with a cap
    dq_i = scale sum_j ds_ij k_j;   dk_j = scale sum_i ds_ij q_i;   dv_j = sum_i p_ij dout_i

With dropout out sums z_ij p_ij v_j, z_ij 0 or 1 / (1 - dropout_p): dv takes z_ij p_ij, ds_ij takes z_ij dout_i . v_j.

FLOPs: 4 L S D a head forward, half of it when causal. Scores are never stored: forward reads q, k, v and writes out and
one number a query, lse in units of log2. Saved for backward: those five. Backward is a pass for delta (reads out and
dout), then a kernel for dk and dv, a program for each tile of keys, over the queries of all heads that read it, and one
for dq, a program for each tile of queries: 14 L S D, the scores formed twice, because every sum is then made by one
program in one order. Two runs give the same bits; the 10 L S D of a single pass would add up dq by atomics.

Tiles that the causal bound, the window or a document's end leaves empty are never loaded; tiles seen whole take no
mask arithmetic by position; the program with the most tiles starts first; heads that share keys, and as many others as
the L2 cache holds, run side by side. A few queries against many keys, as in generation: the queries of all heads that
share keys are one tile, the keys are split over programs, and a second kernel joins the parts by their lse.

Sums, scores and weights are in fp32; p and ds are rounded to the inputs' dtype as operands of matrix products, as in
every fused attention. fp32 inputs take exact products, without tensor cores' tf32. Calls that no kernel covers, float
masks and float64 among them, are PyTorch's operators; the explicit form below, which serves `softcap` and `return_lse`
there, holds L x S scores a head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime, configs
from ._arguments import check_softcap, soft_cap
from ._math import tanh
from ._rows import accumulator
from ._runtime import Operator, kernel, launch, tl, with_kernel

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
_FARTHEST = 2**30
_UNLIMITED = (-1, -1)
_ALIGNMENTS = ("top_left", "bottom_right")


def _window(window_size: Sequence[int] | None) -> tuple[int, int]:
    """(left, right) checked; None and any negative side mean unlimited, written -1."""
    if window_size is None:
        return _UNLIMITED
    if len(window_size) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in window_size):
        raise ValueError(f"window_size: got {window_size!r}; give (left, right), two ints, -1 for an open side")
    left, right = window_size
    return max(left, -1), max(right, -1)


def _check_key_mask(key_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Raise ValueError unless `key_mask` is None or a bool tensor (B, S) for 4-d inputs."""
    if key_mask is None:
        return
    expected = (query.shape[0], key.shape[-2])
    if not isinstance(key_mask, Tensor):
        raise ValueError(f"key_mask: got {key_mask!r}; give a torch.bool tensor (B, S), True = takes part, or None")
    if query.dim() != 4 or key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected:
        raise ValueError(
            f"key_mask: got {key_mask.dtype} {tuple(key_mask.shape)} for query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}; give torch.bool (B, S), True = takes part, with (B, H, T, D) inputs"
        )


def _check_align(causal_align: str) -> None:
    if causal_align not in _ALIGNMENTS:
        raise ValueError(f"causal_align: got {causal_align!r}; give 'top_left' or 'bottom_right'")


def _is_plain(
    window: tuple[int, int], is_causal: bool, causal_align: str, softcap: Any, key_mask: Any, return_lse: bool
) -> bool:
    """Whether the call uses none of our options, so that it is PyTorch's."""
    positions = window == _UNLIMITED and (not is_causal or causal_align == "top_left")
    return positions and softcap is None and key_mask is None and not return_lse


def _check_attn_mask(attn_mask: Tensor | None, query: Tensor) -> None:
    """PyTorch's error for a mask that its own operator refuses, which merged or added would be taken."""
    if attn_mask is None:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: got {attn_mask!r}; give a tensor that broadcasts to (B, H, L, S), or None")
    taken = (torch.bool, torch.float32, query.dtype)
    if torch.is_autocast_enabled(query.device.type):
        taken = (*taken, torch.float16, torch.bfloat16)  # cast before the operator sees them
    if attn_mask.dtype in taken:
        return
    raise RuntimeError(
        f"attn_mask: got {attn_mask.dtype} with query {query.dtype}; give torch.bool (True = visible) or {query.dtype}"
    )


def _visible(
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    window: tuple[int, int],
    bottom_right: bool,
    key_mask: Tensor | None,
) -> Tensor | None:
    """Which keys each query may see by position and key_mask: bool, broadcasts to the scores; None = all."""
    L, S = query.shape[-2], key.shape[-2]
    left, right = window
    if is_causal:
        right = 0
    mask = None
    if left >= 0 or right >= 0:
        positions = torch.arange(L, device=query.device)[:, None] + (S - L if bottom_right else 0)
        keys = torch.arange(S, device=query.device)
        mask = torch.ones(L, S, dtype=torch.bool, device=query.device)
        if left >= 0:
            mask &= keys >= positions - left
        if right >= 0:
            mask &= keys <= positions + right
    if key_mask is None:
        return mask
    per_batch = key_mask[:, None, None, :]
    return per_batch if mask is None else per_batch & mask


def _merge_masks(attn_mask: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """One mask for both: bool stays bool, a float mask becomes -inf where a key is not visible."""
    if attn_mask is None or visible is None:
        return visible if attn_mask is None else attn_mask
    if attn_mask.dtype == torch.bool:
        return attn_mask & visible
    return torch.where(visible, attn_mask, -math.inf)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The equations of the module's text, in fp32 (float64 for float64), holding every score: (out, lse)."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"query, key, value: got {query.dtype}, {key.dtype}, {value.dtype}; give one dtype for all three"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    k, v = key.to(wide), value.to(wide)
    if enable_gqa:
        k = k.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        v = v.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = soft_cap(query.to(wide) @ k.transpose(-2, -1) * factor, softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    # An empty row's softmax and its gradient would be NaN: give it harmless scores, then overwrite what it yields.
    empty = (scores == -math.inf).all(-1)
    scores = scores.masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty, -math.inf)
    weights = scores.softmax(-1).masked_fill(empty[..., None], 0.0)
    return F.dropout(weights, dropout_p) @ v, lse


def _without_autocast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """`_explicit` on what autocast makes of the inputs, its own products left in fp32; out in the inputs' dtype."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        out, lse = _explicit(query, key, value, mask, *options)
        return out.to(query.dtype), lse
    cast = torch.get_autocast_dtype(kind)
    query, key, value = (x if x.dtype == torch.float64 else x.to(cast) for x in (query, key, value))
    with torch.autocast(kind, enabled=False):
        out, lse = _explicit(query, key, value, mask, *options)
    return out.to(query.dtype), lse


def _laid_out_as(out: Tensor, query: Tensor) -> Tensor:
    """`out` with the memory order of a (B, T, H, D) tensor if `query` is a view of one."""
    if query.dim() == 4 and not query.is_contiguous() and query.transpose(1, 2).is_contiguous():
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out


def scaled_dot_product_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = _UNLIMITED,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`scaled_dot_product_attention` in PyTorch's operators: the definition, and the path without a kernel."""
    check_softcap(softcap)
    window = _window(window_size)
    _check_align(causal_align)
    explicit = softcap is not None or return_lse
    if _is_plain(window, is_causal, causal_align, softcap, key_mask, return_lse):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_key_mask(key_mask, query, key)
    visible = _visible(query, key, is_causal, window, causal_align == "bottom_right", key_mask)
    _check_attn_mask(attn_mask, query)
    mask = _merge_masks(attn_mask, visible)
    if not explicit:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    out, lse = _without_autocast(query, key, value, mask, dropout_p, scale, enable_gqa, softcap)
    out = _laid_out_as(out, query)
    return (out, lse) if return_lse else out


def _check_heads(query: Tensor, key: Tensor, enable_gqa: bool, paged: bool) -> None:
    """ValueError unless the numbers of heads go together, as in PyTorch's varlen_attn."""
    heads, key_heads = query.size(1), key.size(2 if paged else 1)
    if heads != key_heads and (not enable_gqa or heads % key_heads):
        raise ValueError(
            f"heads: got {heads} in query and {key_heads} in key (enable_gqa={enable_gqa}); give equal numbers, or "
            "enable_gqa=True and a multiple"
        )


def _document_keys(
    key: Tensor,
    value: Tensor,
    document: int,
    starts: list[int] | None,
    used: list[int] | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values (S, Hk, D) of one document, out of the packed tensors or out of the pages of its block table."""
    if block_table is not None:
        if used is None:
            raise ValueError("block_table: needs seqused_k, the number of valid keys of each document")
        pages = block_table[document]
        length = used[document]
        return key[pages].flatten(0, 1)[:length], value[pages].flatten(0, 1)[:length]
    if starts is None:
        raise ValueError("cu_seq_k: got None; give the documents' cumulative key lengths, (N + 1,)")
    begin, end = starts[document], starts[document + 1]
    if used is not None:
        end = min(end, begin + used[document])
    return key[begin:end], value[begin:end]


def varlen_attn_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = _UNLIMITED,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`varlen_attn` as one call per document: the definition, and the path where no kernel runs.

    Reads the cumulative lengths on the host: on a GPU that waits for the device.
    """
    _check_heads(query, key, enable_gqa, block_table is not None)
    check_softcap(softcap)
    window = _window(window_size)
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    q_starts = cu_seq_q.tolist()
    k_starts = None if cu_seq_k is None else cu_seq_k.tolist()
    used = None if seqused_k is None else seqused_k.tolist()
    outs, lses = [query.new_empty(0, query.shape[1], value.shape[-1])], []
    for document, (begin, end) in enumerate(pairwise(q_starts)):
        k, v = _document_keys(key, value, document, k_starts, used, block_table)
        q, k, v = (x.transpose(0, 1)[None] for x in (query[begin:end], k, v))
        result = scaled_dot_product_attention_reference(
            q,
            k,
            v,
            scale=scale,
            enable_gqa=enable_gqa,
            window_size=window,
            softcap=softcap,
            causal_align="bottom_right",
            return_lse=want_lse,
        )
        out, lse = result if isinstance(result, tuple) else (result, None)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse)
    packed = torch.cat(outs)
    if not want_lse:
        return packed
    none = query.new_zeros(query.shape[1], 0, dtype=torch.promote_types(query.dtype, torch.float32))
    return packed, torch.cat([none, *(lse[0] for lse in lses)], -1)


# Kernels. Names besides the package's: Q, K, V and OUT are heads, (positions, D or E channels) each; T queries, S keys.
# Query t stands at t + shift among the keys and sees keys t + shift - left .. t + shift + right. Scores are in units of
# log2, so that a weight is one exp2: s = scale log2(e) q.k. Strides of heads come in units of UNIT elements, as many
# as 16 bytes hold where that divides them all, so that the compiler sees aligned rows and loads 16 bytes at once;
# MASK_STEP is a mask's stride along the keys, 1 or 0. Of
# packed documents CU_Q and CU_K say where each begins; `batch` is then a document.


@kernel()
def _place(program, tiles, rows, heads, section, REVERSE: tl.constexpr):
    """(tile, batch, head) of a program: all tiles of `section` heads, heavy tiles first, then the next `section`.

    The heads of a section are as many as fit the L2 cache with all their keys.
    """
    first = program // (section * tiles) * section
    inside = program % (section * tiles)
    width = tl.minimum(section, rows - first)
    tile, row = inside // width, first + inside % width
    if REVERSE:
        tile = tiles - 1 - tile
    return tile, row // heads, row % heads


@kernel()
def _document(CU, batch):
    """(begin, length) of a packed document."""
    begin = tl.load(CU + batch).to(tl.int64)
    return begin, (tl.load(CU + batch + 1).to(tl.int64) - begin).to(tl.int32)


@kernel()
def _tile_range(
    start,
    own,
    other,
    shift,
    before,
    after,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):
    """What positions start .. start + SIZE - 1 (below `own`) see of the other side, in tiles of BLOCK positions.

    Position p sees p + shift - before .. p + shift + after, below `other`. Returns (first, full, edge, stop): tiles
    from `full` to `edge` are seen whole by every position, those from `first` and those up to `stop` in part.
    """
    last = tl.minimum(start + SIZE, own) - 1
    first, full, edge, stop = 0, 0, other, other
    if HAS_BEFORE:
        first = tl.maximum(start + shift - before, 0) // BLOCK * BLOCK
        full = tl.cdiv(tl.maximum(last + shift - before, 0), BLOCK) * BLOCK
    if HAS_AFTER:
        edge = tl.minimum(edge, tl.maximum(start + shift + after + 1, 0))
        stop = tl.minimum(stop, tl.maximum(last + shift + after + 1, 0))
    # A tile past the last position sees nothing.
    edge, stop = tl.where(start < own, edge, 0), tl.where(start < own, stop, 0)
    full = tl.minimum(full, tl.cdiv(stop, BLOCK) * BLOCK)
    edge = tl.maximum(edge // BLOCK * BLOCK, full)
    return first, full, edge, stop


@kernel()
def _load_tile(at, rows_ok, cols_ok, CHECK_ROWS: tl.constexpr, CHECK_COLS: tl.constexpr):
    """A tile, 0 outside; unchecked sides cost nothing."""
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(at, mask=rows_ok & cols_ok, other=0.0)
    if CHECK_ROWS:
        return tl.load(at, mask=rows_ok, other=0.0)
    if CHECK_COLS:
        return tl.load(at, mask=cols_ok, other=0.0)
    return tl.load(at)


@kernel()
def _seen(
    rows,
    rows_ok,
    cols,
    S,
    shift,
    left,
    right,
    mask_rows,
    key_mask,
    stride_ws,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_STEP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):
    """Which of `cols` (keys) each of `rows` (queries) may see; one is a row of a tile, the other a column."""
    seen = cols < S
    if HAS_KEY_MASK:
        seen = seen & (tl.load(key_mask + cols * stride_ws, mask=seen, other=0) != 0)
    if MASKED:
        if HAS_LEFT:
            seen = seen & (cols >= rows + (shift - left))
        if HAS_RIGHT:
            seen = seen & (cols <= rows + (shift + right))
    if HAS_MASK:
        seen = seen & (tl.load(mask_rows + cols * MASK_STEP, mask=rows_ok & (cols < S), other=0) != 0)
    return seen


@kernel()
def _capped(s, scale, softcap):
    """(softcap tanh(s scale / softcap) log2(e), that tanh)"""
    slope = tanh(s * (scale / softcap))
    return slope * (softcap * 1.4426950408889634), slope


@kernel()
def _kept(seed, head, rows, cols, dropout):
    """Which weights dropout keeps: a Philox word for each (head, query, key), the same in every kernel and tile."""
    rows, cols = tl.broadcast(rows, cols)
    zeros = tl.zeros_like(rows)
    word, _, _, _ = tl.philox(seed, rows, cols, zeros + head, zeros, 7)
    return tl.uint_to_uniform_float(word) >= dropout


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
    S,
    shift,
    left,
    right,
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
    ACC: tl.constexpr,
):
    """Online softmax over the keys begin .. end of one tile of queries: (sum of p v, sum of p, largest score)."""
    d_ok, e_ok = (tl.arange(0, BLOCK_D) < D)[:, None], (tl.arange(0, BLOCK_E) < E)[None, :]
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # type: ignore[attr-defined]
        cols = start + tl.arange(0, BLOCK_N)
        k = _load_tile(k_at + start * stride_ks, d_ok, (cols < S)[None, :], D != BLOCK_D, MASKED)
        s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        factor = scale * 1.4426950408889634
        if HAS_SOFTCAP:
            s, _ = _capped(s, scale, softcap)
            factor = 1.0
        if MASKED or HAS_MASK or HAS_KEY_MASK:
            seen = _seen(
                rows,
                rows_ok,
                cols[None, :],
                S,
                shift,
                left,
                right,
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
            p = tl.where(_kept(seed, head, rows, cols[None, :], dropout), p, 0.0)
        v = _load_tile(v_at + start * stride_vs, (cols < S)[:, None], e_ok, MASKED, E != BLOCK_E)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
        top = higher
    return acc, total, top


@kernel(
    do_not_specialize=(
        *("T", "S", "total_q", "heads", "group", "tiles", "rows_of_heads", "section", "splits", "chunk"),
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_ks"),
        *("stride_vb", "stride_vh", "stride_vs", "stride_op", "stride_ob", "stride_oh", "stride_ot"),
        *("stride_mb", "stride_mh", "stride_mt", "stride_wb", "stride_ws", "left", "right"),
    )
)
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
    """One tile of queries of one head; with SPLIT all queries of a group of heads against one chunk of the keys."""
    program = tl.program_id(0)
    split = 0
    if SPLIT:
        split = program % splits
        program = program // splits
    tile, batch, head = _place(program, tiles, rows_of_heads, heads, section, HAS_RIGHT)
    key_head = head // group
    if SPLIT:
        key_head = head
        head = head * group
    begin_q, begin_k, lse_row = tl.zeros([], tl.int64), tl.zeros([], tl.int64), batch
    at_batch = tl.cast(batch, tl.int64)
    if PACKED:
        begin_q, T = _document(CU_Q, batch)
        begin_k, S = _document(CU_K, batch)
        if USED:
            S = tl.minimum(S, tl.load(USED_K + batch).to(tl.int32))
        at_batch, lse_row = begin_k * 0, 0
    shift = 0
    if BOTTOM_RIGHT:
        shift = S - T

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
    q_at += (wide_rows * stride_qt + wide_group * stride_qh) * UNIT + d[None, :]
    k_at = K + (at_batch * stride_kb + tl.cast(key_head, tl.int64) * stride_kh) * UNIT + begin_k * stride_ks
    k_at += n[None, :] * stride_ks + d[:, None]
    v_at = V + (at_batch * stride_vb + tl.cast(key_head, tl.int64) * stride_vh) * UNIT + begin_k * stride_vs
    v_at += n[:, None] * stride_vs + e[None, :]
    mask_rows = MASK + at_batch * stride_mb + tl.cast(head, tl.int64) * stride_mh
    mask_rows += wide_rows * stride_mt + wide_group * stride_mh
    key_mask = KEY_MASK + at_batch * stride_wb
    q = _load_tile(q_at, rows_ok[:, None], (d < D)[None, :], True, D != BLOCK_D)

    first, full, edge, stop = _tile_range(start, T, S, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
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
    for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k_at,
            v_at,
            first if phase == 0 else (full if phase == 1 else edge),
            full if phase == 0 else (edge if phase == 1 else stop),
            rows[:, None],
            rows_ok[:, None],
            S,
            shift,
            left,
            right,
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
        lse_head = (tl.cast(lse_row, tl.int64) + tl.cast(split, tl.int64) * (rows_of_heads // heads)) * row_heads + head
        lse_at = LSE + lse_head * total_q + begin_q
        tl.store(lse_at + group_rows.to(tl.int64) * total_q + rows, lse, mask=rows_ok)


@kernel(do_not_specialize=("T", "heads", "rows_of_heads", "splits", "stride_ob", "stride_oh", "stride_ot"))
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


@kernel(
    do_not_specialize=(
        *("T", "heads", "tiles", "stride_ob", "stride_oh", "stride_ot"),
        *("stride_dob", "stride_doh", "stride_dot", "stride_dlb", "stride_dlh", "stride_dlt"),
    )
)
def attention_delta_kernel(
    OUT,
    DO,
    LSE,
    DLSE,
    DELTA,
    T,
    heads,
    tiles,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dlb,
    stride_dlh,
    stride_dlt,
    BLOCK_M: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    ACC: tl.constexpr,
):
    """delta = rowsum(dout out) - dlse log2(e), lse being in units of log2; 0 for a row that saw nothing."""
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    rows_ok = rows < T
    out_at = OUT + (batch * stride_ob + head * stride_oh + rows[:, None] * stride_ot) * UNIT + e[None, :]
    do_at = DO + (batch * stride_dob + head * stride_doh + rows[:, None] * stride_dot) * UNIT + e[None, :]
    out = _load_tile(out_at, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E).to(ACC)
    do = _load_tile(do_at, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E).to(ACC)
    delta = tl.sum(out * do, 1)
    at = row.to(tl.int64) * T + rows
    if HAS_DLSE:
        dlse_at = DLSE + batch * stride_dlb + head * stride_dlh + rows * stride_dlt
        delta -= tl.load(dlse_at, mask=rows_ok, other=0.0) * 1.4426950408889634
        lse = tl.load(LSE + at, mask=rows_ok, other=0.0)
        delta = tl.where(lse == float("-inf"), 0.0, delta)
    tl.store(DELTA + at, delta, mask=rows_ok)


@kernel()
def _finite(lse):
    """+inf for the lse of a row that saw nothing or is not there: its weights 2^(s - lse) must be 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@kernel()
def _weights(s, lse, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(p, slope): p = 2^(s - lse) from q.k; slope is the soft-cap's tanh."""
    slope = s
    if HAS_SOFTCAP:
        s, slope = _capped(s, scale, softcap)
        p = tl.exp2(s - lse)
    else:
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse)
    return p, slope


@kernel()
def _score_gradient(p, dp, delta, slope, kept, dropout, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    """ds = p (dp - delta), without the scale: the results are scaled once."""
    if HAS_DROPOUT:
        dp = tl.where(kept, dp / (1.0 - dropout), 0.0)
    ds = p * (dp - delta)
    if HAS_SOFTCAP:
        ds *= 1.0 - slope * slope
    return ds


@kernel()
def _alone(rows, S, shift, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which queries have one key in sight, as a causal sequence's first: dp and delta differ by rounding alone."""
    last = tl.zeros_like(rows) + (S - 1)
    if HAS_RIGHT:
        last = tl.minimum(rows + (shift + right), last)
    if HAS_LEFT:
        last -= tl.maximum(rows + (shift - left), 0)
    return last == 0


@kernel(
    do_not_specialize=(
        *("T", "S", "total_q", "heads", "group", "tiles", "rows_of_heads", "section"),
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_ks"),
        *("stride_vb", "stride_vh", "stride_vs", "stride_dob", "stride_doh", "stride_dot"),
        *("stride_dkb", "stride_dkh", "stride_dks", "stride_dvb", "stride_dvh", "stride_dvs"),
        *("stride_mb", "stride_mh", "stride_mt", "stride_wb", "stride_ws", "left", "right"),
    )
)
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
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    ACC: tl.constexpr,
):
    """dk and dv of one tile of keys of one head of keys, over the queries of all heads that read it, in order."""
    tile, batch, key_head = _place(tl.program_id(0), tiles, rows_of_heads, heads, section, False)
    begin_q, begin_k, row_batch = tl.zeros([], tl.int64), tl.zeros([], tl.int64), batch
    at_batch = tl.cast(batch, tl.int64)
    stored = S
    if PACKED:
        begin_q, T = _document(CU_Q, batch)
        begin_k, S = _document(CU_K, batch)
        stored = S
        if USED:
            S = tl.minimum(S, tl.load(USED_K + batch).to(tl.int32))
        at_batch, row_batch = begin_k * 0, 0
    shift = 0
    if BOTTOM_RIGHT:
        shift = S - T
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
    k = _load_tile(k_at, cols_ok, (d < D)[None, :], True, D != BLOCK_D)
    v = _load_tile(v_at, cols_ok, (e < E)[None, :], True, E != BLOCK_E)
    key_mask = KEY_MASK + at_batch * stride_wb
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEED)

    # One loop over the tiles of queries of one head after another: the next head's are on their way while the last
    # one's are summed, and one body holds fewer registers than one for whole tiles and one for edges.
    first, full, edge, stop = _tile_range(start, S, T, -shift, right, left, BLOCK_N, BLOCK_M, HAS_RIGHT, HAS_LEFT)
    count = tl.maximum(tl.cdiv(stop - first, BLOCK_M), 0)
    q_at = Q + at_batch * stride_qb * UNIT + begin_q * stride_qt + (m[None, :] * stride_qt + d[:, None])
    do_at = DO + at_batch * stride_dob * UNIT + begin_q * stride_dot + (m[:, None] * stride_dot + e[None, :])
    rows_at = tl.cast(row_batch, tl.int64) * (heads * group) * total_q + begin_q
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
        q = _load_tile(q_tile, (d < D)[:, None], rows_ok[None, :], D != BLOCK_D, True)
        s = tl.dot(k, q, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        lse = tl.load(LSE + at + m, mask=rows_ok, other=float("-inf"))
        p, slope = _weights(s, _finite(lse)[None, :], scale, softcap, HAS_SOFTCAP)
        on_edge = (begin < full) | (begin >= edge)
        if HAS_MASK or HAS_KEY_MASK or on_edge:
            seen = _seen(
                rows[None, :],
                rows_ok[None, :],
                cols[:, None],
                S,
                shift,
                left,
                right,
                MASK + at_batch * stride_mb + wide_head * stride_mh + rows.to(tl.int64)[None, :] * stride_mt,
                key_mask,
                stride_ws,
                True,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_MASK,
                MASK_STEP,
                HAS_KEY_MASK,
            )
            p = tl.where(seen, p, 0.0)
        do_tile = do_at + wide_head * stride_doh * UNIT + begin * stride_dot
        do = _load_tile(do_tile, rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E)
        kept = p
        if HAS_DROPOUT:
            kept = _kept(seed, batch * (heads * group) + head, rows[None, :], cols[:, None], dropout)
        if HAS_DV:
            # dv = (p kept)^T do
            weights = p
            if HAS_DROPOUT:
                weights = tl.where(kept, p, 0.0)
            dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee", out_dtype=ACC)
        if HAS_DK:
            # dk = ds^T q
            delta = tl.load(DELTA + at + m, mask=rows_ok, other=0.0)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee", out_dtype=ACC)
            ds = _score_gradient(p, dp, delta[None, :], slope, kept, dropout, HAS_SOFTCAP, HAS_DROPOUT)
            if on_edge or S == 1:
                ds = tl.where(_alone(rows, S, shift, left, right, HAS_LEFT, HAS_RIGHT)[None, :], 0.0, ds)
            dk = tl.dot(ds.to(q.dtype), tl.trans(q), dk, input_precision="ieee", out_dtype=ACC)
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
    S,
    shift,
    left,
    right,
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
    ACC: tl.constexpr,
):
    """Add what the keys begin .. end give to dq of one tile of queries."""
    d_ok, e_ok = (tl.arange(0, BLOCK_D) < D)[:, None], (tl.arange(0, BLOCK_E) < E)[:, None]
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # type: ignore[attr-defined]
        cols = start + tl.arange(0, BLOCK_N)
        cols_ok = (cols < S)[None, :]
        k = _load_tile(k_at + start * stride_ks, d_ok, cols_ok, D != BLOCK_D, MASKED)
        v = _load_tile(v_at + start * stride_vs, e_ok, cols_ok, E != BLOCK_E, MASKED)
        s = tl.dot(q, k, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        p, slope = _weights(s, lse, scale, softcap, HAS_SOFTCAP)
        if MASKED or HAS_MASK or HAS_KEY_MASK:
            seen = _seen(
                rows,
                rows_ok,
                cols[None, :],
                S,
                shift,
                left,
                right,
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
            p = tl.where(seen, p, 0.0)
        kept = p
        if HAS_DROPOUT:
            kept = _kept(seed, head, rows, cols[None, :], dropout)
        dp = tl.dot(do, v, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
        ds = _score_gradient(p, dp, delta, slope, kept, dropout, HAS_SOFTCAP, HAS_DROPOUT)
        if MASKED:
            ds = tl.where(_alone(rows, S, shift, left, right, HAS_LEFT, HAS_RIGHT), 0.0, ds)
        # dq = ds k
        dq = tl.dot(ds.to(k.dtype), tl.trans(k), dq, input_precision="ieee", out_dtype=ACC)  # type: ignore[arg-type]
    return dq


@kernel(
    do_not_specialize=(
        *("T", "S", "total_q", "heads", "group", "tiles", "rows_of_heads", "section"),
        *("stride_qb", "stride_qh", "stride_qt", "stride_kb", "stride_kh", "stride_ks"),
        *("stride_vb", "stride_vh", "stride_vs", "stride_dob", "stride_doh", "stride_dot"),
        *("stride_dqb", "stride_dqh", "stride_dqt"),
        *("stride_mb", "stride_mh", "stride_mt", "stride_wb", "stride_ws", "left", "right"),
    )
)
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
    ACC: tl.constexpr,
):
    """dq of one tile of queries of one head."""
    tile, batch, head = _place(tl.program_id(0), tiles, rows_of_heads, heads, section, HAS_RIGHT)
    begin_q, begin_k, row_batch = tl.zeros([], tl.int64), tl.zeros([], tl.int64), batch
    at_batch = tl.cast(batch, tl.int64)
    if PACKED:
        begin_q, T = _document(CU_Q, batch)
        begin_k, S = _document(CU_K, batch)
        if USED:
            S = tl.minimum(S, tl.load(USED_K + batch).to(tl.int32))
        at_batch, row_batch = begin_k * 0, 0
    shift = 0
    if BOTTOM_RIGHT:
        shift = S - T
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
    row = (tl.cast(row_batch, tl.int64) * heads + head) * total_q + begin_q
    q = _load_tile(q_at + d[None, :], rows_ok[:, None], (d < D)[None, :], True, D != BLOCK_D)
    do = _load_tile(do_at + e[None, :], rows_ok[:, None], (e < E)[None, :], True, E != BLOCK_E)
    delta = tl.load(DELTA + row + rows, mask=rows_ok, other=0.0)
    lse = _finite(tl.load(LSE + row + rows, mask=rows_ok, other=float("-inf")))
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(SEED)

    first, full, edge, stop = _tile_range(start, T, S, shift, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
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
            S,
            shift,
            left,
            right,
            stride_ks,
            stride_vs,
            mask_rows,
            key_mask,
            stride_ws,
            scale,
            softcap,
            seed,
            batch * heads + head,
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
            ACC,
        )
    dq_at = DQ + (at_batch * stride_dqb + wide_head * stride_dqh + (begin_q + wide_rows) * stride_dqt) * UNIT
    tl.store(dq_at + d[None, :], (dq * scale).to(DQ.dtype.element_ty), mask=rows_ok[:, None] & (d < D)[None, :])


# Launchers. Every tensor of heads is (batch, heads, positions, channels); packed documents are one batch.


class _Options(NamedTuple):
    """What every operator here takes besides tensors, in the order of the schemas; -1 is an open side."""

    max_q: int
    max_k: int
    left: int
    right: int
    bottom_right: bool
    scale: float
    softcap: float
    dropout: float


class _Extras(NamedTuple):
    """The tensors beside q, k and v, in the order of the schemas."""

    mask: Tensor | None
    key_mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    used_k: Tensor | None
    seed: Tensor | None


def _empty_like(x: Tensor, channels: int) -> Tensor:
    """An empty (B, H, T, channels), dense, with heads inside positions in memory if x has them so."""
    B, H, T, _ = x.shape
    strides = (T * H * channels, T * channels, channels, 1)
    if x.stride(1) < x.stride(2):
        strides = (T * H * channels, channels, H * channels, 1)
    # Not a transposed view: autograd would refuse changes in place.
    return torch.empty_strided((B, H, T, channels), strides, dtype=x.dtype, device=x.device)


def _unit(x: Tensor) -> int:
    """How many elements 16 bytes hold."""
    return max(1, 16 // x.itemsize)


def _steps(x: Tensor) -> list[int]:
    """[batch, head, position] strides; an axis of one element has none to speak of."""
    return [0 if x.shape[axis] == 1 else x.stride(axis) for axis in range(3)]


def _readable(x: Tensor) -> Tensor:
    """A copy only where channels do not lie side by side, or where rows could start on 16-byte boundaries and do not.

    Reading it element by element would cost more, in time and in registers.
    """
    x = x.resolve_neg()
    unit = _unit(x)
    wide = x.shape[-1] % unit == 0
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return x.contiguous()
    if wide and (x.data_ptr() % 16 or any(step % unit for step in _steps(x))):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _strides(*tensors: Tensor) -> tuple[int, list[int]]:
    """(unit, [batch, head, position] of each tensor in units)."""
    strides = [step for x in tensors for step in _steps(x)]
    unit = _unit(tensors[0])
    unit = unit if all(stride % unit == 0 for stride in strides) else 1
    return unit, [stride // unit for stride in strides]


def _power_of_2(n: int) -> int:
    """The smallest power of 2 that holds n and that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    D, E = q.shape[-1], v.shape[-1]
    return {"D": D, "E": E, "BLOCK_D": _power_of_2(D), "BLOCK_E": _power_of_2(E)}


def _config(
    table: configs.AttentionTable, fp32: configs.AttentionTable, q: Tensor, v: Tensor, masked: bool = False
) -> configs.AttentionConfig:
    """The configuration for these tensors, of `fp32` if they are wider than 16 bits."""
    table = fp32 if q.itemsize > 2 else table
    head_dim = _power_of_2(max(q.shape[-1], v.shape[-1]))
    return configs.attention_config(table, _runtime.architecture(q.device), head_dim, masked)


def _switches(extras: _Extras, options: _Options) -> dict[str, int]:
    return {
        "BOTTOM_RIGHT": options.bottom_right,
        "HAS_LEFT": options.left >= 0,
        "HAS_RIGHT": options.right >= 0,
        "HAS_MASK": extras.mask is not None,
        "MASK_STEP": 0 if extras.mask is None else extras.mask.stride(3),
        "HAS_KEY_MASK": extras.key_mask is not None,
        "HAS_SOFTCAP": options.softcap > 0.0,
        "HAS_DROPOUT": options.dropout > 0.0,
        "PACKED": extras.cu_q is not None,
        "USED": extras.used_k is not None,
    }


def _stepping(extras: _Extras) -> _Extras:
    """The same with a mask whose keys lie side by side, or are one for all; a copy where they do not."""
    mask = extras.mask
    if mask is None or mask.stride(3) in (0, 1):
        return extras
    if mask.shape[3] == 1:
        return extras._replace(mask=mask.as_strided(mask.shape, (*mask.stride()[:3], 0), mask.storage_offset()))
    return extras._replace(mask=mask.contiguous())


def _pointers(extras: _Extras, absent: Tensor) -> list[Tensor]:
    """The extras as kernels take them: masks as bytes, any pointer for what is not there."""
    return [absent if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x.contiguous() for x in extras]


def _scalars(extras: _Extras, options: _Options) -> list[Any]:
    """The last arguments of the three large kernels: the masks' strides, the window, the scales."""
    mask = [0] * 3 if extras.mask is None else extras.mask.stride()[:3]
    key_mask = [0] * 2 if extras.key_mask is None else extras.key_mask.stride()
    return [*mask, *key_mask, options.left, options.right, options.scale, options.softcap, options.dropout]


def _documents(q: Tensor, k: Tensor, extras: _Extras, options: _Options) -> tuple[int, int, int]:
    """(batches, longest queries, longest keys), of the documents if there are any."""
    if extras.cu_q is None:
        return q.shape[0], q.shape[2], k.shape[2]
    return extras.cu_q.shape[0] - 1, options.max_q, options.max_k


def _grid(batch: int, heads: int, length: int, block: int, shared: int, bytes_each: int) -> tuple[int, int, int]:
    """(tiles, rows of heads, section) as `_place` takes them; `shared` heads read the same bytes_each bytes."""
    return -(-length // block), batch * heads, min(batch * heads, shared * configs.attention_section(bytes_each))


class _Work(NamedTuple):
    """How a forward launch is cut into programs, in the kernel's order."""

    heads: int  # that have programs of their own: of queries, or of keys when the queries of a group go together
    group: int
    tiles: int
    rows: int  # heads in all batches
    section: int
    splits: int = 1
    chunk: int = 0


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """(out, lse), lse in units of log2, empty if it is not asked for."""
    extras, options, save_lse = _stepping(_Extras(*rest[:6])), _Options(*rest[6:-1]), rest[-1]
    out, lse = _fake_forward(q, k, v, *rest)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0 or extras.cu_q is not None:
        # What belongs to no document is never written.
        out.zero_()
        lse.fill_(-math.inf)
    if k.numel() == 0:
        return out, lse
    q, k, v = _readable(q), _readable(k), _readable(v)
    if _few_queries(q, k, extras, options):
        _launch_decode((q, k, v, out, lse), extras, options, save_lse)
        return out, lse
    config = _config(configs.ATTENTION_FORWARD, configs.ATTENTION_FP32, q, v, extras.mask is not None)
    batch, longest, keys = _documents(q, k, extras, options)
    group = q.shape[1] // k.shape[1]
    key_bytes = keys * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = _grid(batch, q.shape[1], longest, config.block_m, group, key_bytes)
    work = _Work(q.shape[1], group, tiles, rows, section)
    _run_forward((q, k, v, out, lse), extras, options, work, config, save_lse)
    return out, lse


def _run_forward(
    tensors: tuple[Tensor, ...],
    extras: _Extras,
    options: _Options,
    work: _Work,
    config: configs.AttentionConfig,
    save_lse: bool,
    split: bool = False,
    stride_split: int = 0,
) -> None:
    """Launch the forward kernel on q, k, v, out, lse."""
    q, k, v, out, lse = tensors
    unit, strides = _strides(q, k, v, out)
    launch(
        attention_forward_kernel,
        (work.tiles * work.rows * work.splits,),
        (
            *(q, k, v, *_pointers(extras, q)),
            *(out, lse),
            *(q.shape[2], k.shape[2], q.shape[2], *work),
            *(*strides[:9], stride_split // unit, *strides[9:]),
            *_scalars(extras, options),
        ),
        num_warps=config.num_warps,
        max_registers=configs.ATTENTION_FP32_REGISTERS if q.itemsize > 2 else None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **_sizes(q, v),
        UNIT=unit,
        STAGES=config.num_stages,
        **_switches(extras, options),
        SPLIT=split,
        SAVE_LSE=save_lse,
        ACC=accumulator(q.dtype)[1],
    )


def _few_queries(q: Tensor, k: Tensor, extras: _Extras, options: _Options) -> bool:
    """Whether all queries of a group of heads fit one small tile against keys long enough to be split."""
    rows = q.shape[2] * (q.shape[1] // k.shape[1])
    few = rows <= configs.ATTENTION_DECODE_ROWS and k.shape[2] >= configs.ATTENTION_DECODE_KEYS
    return few and extras.cu_q is None and options.dropout == 0.0


def _launch_decode(tensors: tuple[Tensor, ...], extras: _Extras, options: _Options, save_lse: bool) -> None:
    """Few queries, many keys: a program for each chunk of the keys, then their results by their log-sum-exps."""
    q, k, v, out, lse = tensors
    (B, H, T, _), Hk, S, E = q.shape, k.shape[1], k.shape[2], v.shape[-1]
    config = _config(configs.ATTENTION_DECODE, configs.ATTENTION_FP32, q, v)
    config = replace(config, block_m=_power_of_2(T * (H // Hk)))
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
    unit, strides = _strides(out)
    sizes = _sizes(q, v)
    launch(
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


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3] if rest[-1] else (0,), dtype=accumulator(q.dtype)[0], device=q.device)
    return _empty_like(q, v.shape[-1]), lse


def _launch_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), those not in `needs` empty."""
    extras, options, needs = _stepping(_Extras(*rest[:6])), _Options(*rest[6:-1]), rest[-1]
    grads = _fake_backward(do, dlse, q, k, v, out, lse, *rest)
    if q.numel() == 0 or k.numel() == 0 or extras.cu_q is not None:
        for grad in grads:
            grad.zero_()
    if q.numel() == 0 or k.numel() == 0:
        return grads
    q, k, v, do = _readable(q), _readable(k), _readable(v), _readable(do)
    inputs = (q, k, v, do, _launch_delta(out, do, lse, dlse), lse)
    if needs[1] or needs[2]:
        _launch_dkdv(inputs, grads, extras, options, needs)
    if needs[0]:
        _launch_dq(inputs, grads[0], extras, options)
    return grads


def _launch_delta(out: Tensor, do: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout out) - dlse log2(e), shaped as lse."""
    (B, H, T), E = lse.shape, out.shape[-1]
    delta = torch.empty_like(lse)
    unit, strides = _strides(out, do)
    dlse = None if dlse is None else dlse.resolve_neg()
    block_e = _power_of_2(E)
    block_m = configs.ATTENTION_DELTA_ELEMENTS // block_e
    tiles = -(-T // block_m)
    launch(
        attention_delta_kernel,
        (B * H * tiles,),
        (
            *(out, do, lse, lse if dlse is None else dlse),
            delta,
            *(T, H, tiles, *strides, *([0] * 3 if dlse is None else dlse.stride())),
        ),
        num_warps=4,
        BLOCK_M=block_m,
        E=E,
        BLOCK_E=block_e,
        UNIT=unit,
        HAS_DLSE=dlse is not None,
        ACC=accumulator(out.dtype)[1],
    )
    return delta


def _launch_dkdv(
    inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...], extras: _Extras, options: _Options, needs: Sequence[bool]
) -> None:
    q, k, v, do, _, _ = inputs
    config = _config(configs.ATTENTION_DKDV, configs.ATTENTION_FP32, q, v)
    batch, queries, keys = _documents(q, k, extras, options)
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    query_bytes = group * queries * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = _grid(batch, heads, keys, config.block_n, 1, query_bytes)
    dk, dv = (grad if need else like for grad, need, like in zip(grads[1:], needs[1:], (k, v), strict=True))
    unit, strides = _strides(q, k, v, do, dk, dv)
    launch(
        attention_dkdv_kernel,
        (tiles * rows,),
        (
            *(*inputs, *_pointers(extras, q)),
            *(grads[1], grads[2]),
            *(q.shape[2], k.shape[2], q.shape[2], heads, group, tiles, rows, section),
            *(*strides, *_scalars(extras, options)),
        ),
        num_warps=config.num_warps,
        max_registers=configs.ATTENTION_FP32_REGISTERS if q.itemsize > 2 else None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **_sizes(q, v),
        UNIT=unit,
        STAGES=config.num_stages,
        **_switches(extras, options),
        HAS_DK=needs[1],
        HAS_DV=needs[2],
        ACC=accumulator(q.dtype)[1],
    )


def _launch_dq(inputs: tuple[Tensor, ...], dq: Tensor, extras: _Extras, options: _Options) -> None:
    q, k, v, do, _, _ = inputs
    config = _config(configs.ATTENTION_DQ, configs.ATTENTION_DQ_FP32, q, v, extras.mask is not None)
    batch, queries, keys = _documents(q, k, extras, options)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    key_bytes = keys * (q.shape[-1] + v.shape[-1]) * q.itemsize
    tiles, rows, section = _grid(batch, heads, queries, config.block_m, group, key_bytes)
    unit, strides = _strides(q, k, v, do, dq)
    launch(
        attention_dq_kernel,
        (tiles * rows,),
        (
            *(*inputs, *_pointers(extras, q)),
            dq,
            *(q.shape[2], k.shape[2], q.shape[2], heads, group, tiles, rows, section),
            *(*strides, *_scalars(extras, options)),
        ),
        num_warps=config.num_warps,
        max_registers=configs.ATTENTION_FP32_REGISTERS if q.itemsize > 2 else None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        **_sizes(q, v),
        UNIT=unit,
        STAGES=config.num_stages,
        **_switches(extras, options),
        ACC=accumulator(q.dtype)[1],
    )


def _fake_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        _empty_like(x, x.shape[-1]) if need else x.new_empty(0) for x, need in zip((q, k, v), rest[-1], strict=True)
    )
    return dq, dk, dv


# Operators and autograd.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *rest[:6])
    ctx.options = _Options(*rest[6:-1])


def _backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *extras = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    rest = (None,) * (len(_Extras._fields) + len(_Options._fields) + 1)
    if (do is None and dlse is None) or not any(needs):
        return (None, None, None, *rest)
    do = torch.zeros_like(out) if do is None else do
    grads = attention_backward(do, dlse, q, k, v, out, lse, *extras, *ctx.options, needs)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *rest)


_EXTRAS = "Tensor? mask, Tensor? key_mask, Tensor? cu_q, Tensor? cu_k, Tensor? used_k, Tensor? seed"
_OPTIONS = (
    "SymInt max_q, SymInt max_k, int left, int right, bool bottom_right, float scale, float softcap, float dropout"
)
attention_forward = Operator(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_OPTIONS}, bool save_lse) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
attention_backward = Operator(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_EXTRAS}, {_OPTIONS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


def _autocast(x: Tensor) -> torch.dtype:
    """The dtype in which autocast hands x to PyTorch's attention."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def _dtype_obstacle(*tensors: Tensor) -> str | None:
    for x in tensors:
        if not x.is_floating_point() or _autocast(x) not in _KERNEL_DTYPES:
            return f"no kernel for {x.dtype}"
    q, k, v = (_autocast(x) for x in tensors)
    return None if q == k == v else f"query, key and value in {q}, {k} and {v}"


def _head_obstacle(query: Tensor, key: Tensor, value: Tensor, heads_axis: int, enable_gqa: bool) -> str | None:
    """Head dimensions and numbers of heads that the kernels do not cover."""
    if query.shape[-1] != key.shape[-1]:
        return f"head dimensions of {query.shape[-1]} and {key.shape[-1]}"
    for x in (query, value):
        if not 0 < x.shape[-1] <= _LARGEST_HEAD:
            return f"a head dimension of {x.shape[-1]}, outside 1 .. {_LARGEST_HEAD}"
    heads, key_heads = query.shape[heads_axis], key.shape[heads_axis]
    if key_heads != value.shape[heads_axis]:
        return f"{key_heads} heads of keys and {value.shape[heads_axis]} of values"
    if heads != key_heads and (not enable_gqa or key_heads == 0 or heads % key_heads):
        return f"{heads} heads of queries and {key_heads} of keys, enable_gqa={enable_gqa}"
    return None


def _scale_obstacle(scale: Any) -> str | None:
    if scale is not None and (not isinstance(scale, (int, float)) or not 0.0 < scale < math.inf):
        return f"a scale of {scale!r}"
    return None


def _mask_obstacle(attn_mask: Any, query: Tensor, key: Tensor) -> str | None:
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        return "a mask that is no bool tensor"
    full = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dim() < 2 or attn_mask.dim() > len(full):
        return f"a mask of {attn_mask.dim()} dimensions"
    if any(size not in (1, whole) for size, whole in zip(attn_mask.shape, full[-attn_mask.dim() :], strict=True)):
        return f"a mask of shape {tuple(attn_mask.shape)}"
    return None


def _obstacle(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    plain: bool,
) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    if not all(isinstance(x, Tensor) for x in (query, key, value)):
        return "an argument is not a tensor"
    if not all(isinstance(flag, bool) for flag in (is_causal, enable_gqa)):
        return "is_causal or enable_gqa is not a bool"
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p < 1.0:
        return f"a dropout of {dropout_p!r}"
    if not query.dim() == key.dim() == value.dim() or query.dim() not in (3, 4):
        return "queries, keys and values are not of 3 or 4 dimensions"
    if key.shape[-2] != value.shape[-2]:
        return f"{key.shape[-2]} keys and {value.shape[-2]} values"
    if query.dim() == 4 and not query.shape[0] == key.shape[0] == value.shape[0]:
        return "batches are broadcast"
    if plain and is_causal and attn_mask is not None:
        return "a mask and is_causal"
    return (
        _dtype_obstacle(query, key, value)
        or _head_obstacle(query, key, value, -3, enable_gqa)
        or _scale_obstacle(scale)
        or _mask_obstacle(attn_mask, query, key)
    )


def _attention(
    tensors: tuple[Tensor, ...],
    extras: tuple[Tensor | None, ...],
    max_lengths: tuple[int, int],
    window: tuple[int, int],
    bottom_right: bool,
    scale: float | None,
    softcap: float | None,
    dropout: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of 4-d tensors, by the operator; lse is empty if it is not asked for."""
    q, k, v = (x.to(_autocast(x)) for x in tensors)
    left, right = (min(side, _FARTHEST) for side in window)
    seed = None
    if dropout > 0.0:
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=q.device)
    options = _Options(
        *max_lengths,
        left,
        right,
        bottom_right and (left >= 0 or right >= 0),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        float(softcap or 0.0),
        float(dropout),
    )
    save_lse = return_lse or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    out, lse = attention_forward(q, k, v, *extras, seed, *options, save_lse)
    return out, lse * math.log(2.0) if return_lse else lse


# Public functions.


@with_kernel
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: tuple[int, int] = _UNLIMITED,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, with windows, padding masks, soft-cap and log-sum-exp.

    query (B, H, L, D), key (B, H, S, D), value (B, H, S, E), or fewer or more leading dimensions; with enable_gqa key
    and value have Hk heads, a divisor of H. attn_mask bool (True = visible) or float (added), broadcasts to
    (B, H, L, S). Returns (B, H, L, E) in query's dtype (under
    autocast in autocast's, as PyTorch's does); for query a transposed (B, L, H, D) tensor,
    `out.transpose(1, 2)` is contiguous. A query that sees no key gives 0.

    window_size: (left, right), how many keys before and after a query's own position it sees; -1 = all.
    softcap: scores become softcap * tanh(scores / softcap), before any mask is added.
    key_mask: (B, S) bool, True = the key takes part: padding, in one row per sequence.
    causal_align: where is_causal and the window put the queries if L != S: "top_left" (query i at key i, PyTorch's)
        or "bottom_right" (the last query at the last key).
    return_lse: (out, lse) with lse (B, H, L) the natural log of the summed exponentials, fp32 (float64 for float64),
        differentiable, -inf where a query sees no key.
    deterministic: False permits a faster backward that is not bitwise repeatable; today both give the same.

    The kernel takes fp32, fp16 and bf16, head dimensions up to 256 and bool masks; float masks and all else are
    PyTorch's operator. Dropout equals PyTorch's in distribution, its seed drawn from the default generator. Our options
    raise ValueError, the others PyTorch's errors. Dao 2023, arXiv:2307.08691.
    """
    check_softcap(softcap)
    window = _window(window_size)
    _check_align(causal_align)
    plain = _is_plain(window, is_causal, causal_align, softcap, key_mask, return_lse)
    obstacle = _obstacle(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, plain)
    if isinstance(query, Tensor):
        _check_key_mask(key_mask, query, key)
    if not _runtime.choose(query, key, value, attn_mask, key_mask, obstacle=obstacle):
        return scaled_dot_product_attention_reference(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window_size=window_size,
            softcap=softcap,
            key_mask=key_mask,
            causal_align=causal_align,
            return_lse=return_lse,
            deterministic=deterministic,
        )
    inner = query.dim() == 3
    tensors = tuple(x[None] for x in (query, key, value)) if inner else (query, key, value)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*tensors[0].shape[:-1], key.shape[-2])
    out, lse = _attention(
        tensors,
        (attn_mask, key_mask, None, None, None),
        (query.shape[-2], key.shape[-2]),
        (window[0], 0) if is_causal else window,
        causal_align == "bottom_right",
        scale,
        softcap,
        dropout_p,
        return_lse,
    )
    out, lse = (out[0], lse[0]) if inner and return_lse else (out[0], lse) if inner else (out, lse)
    return (out, lse) if return_lse else out


@with_kernel
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = _UNLIMITED,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`torch.nn.attention.varlen.varlen_attn`, on every device and dtype: attention inside packed documents.

    query (Tq, H, D), key and value (Tk, Hk, D), N documents one after another; cu_seq_q, cu_seq_k (N + 1,) int32, where
    each begins and the last ends; max_q, max_k the longest lengths. Documents may have zero length. window_size is
    (left, right), bottom-right aligned: causal is (-1, 0). seqused_k (N,) limits each document's keys; block_table
    (N, pages) int32 reads keys from pages (P, page, Hk, D). Returns (Tq, H, D); a query that sees no key gives 0.

    softcap, deterministic: as in `scaled_dot_product_attention`. return_lse (or return_aux with lse=True): (out, lse),
    lse (H, Tq) in fp32 (float64 for float64). num_splits concerns PyTorch's own kernels alone.

    The kernel takes fp32, fp16 and bf16 without pages, never waits for the device, and leaves 0 (lse: -inf) where no
    document lies. Elsewhere half precision on a GPU is PyTorch's operator, everything else one call per document.
    """
    check_softcap(softcap)
    window = _window(window_size)
    options = {
        "return_aux": return_aux,
        "scale": scale,
        "window_size": window_size,
        "enable_gqa": enable_gqa,
        "seqused_k": seqused_k,
        "block_table": block_table,
        "num_splits": num_splits,
    }
    packed = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
    obstacle = _varlen_obstacle(packed, seqused_k, block_table, enable_gqa, scale)
    if not _runtime.choose(query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, obstacle=obstacle):
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and softcap is None and not return_lse:
            torchs = _torch_varlen(options)
            if torchs is not None:
                return torchs(*packed)
        return varlen_attn_reference(
            *packed, **options, softcap=softcap, return_lse=return_lse, deterministic=deterministic
        )
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    out, lse = _attention(
        tuple(x.transpose(0, 1)[None] for x in (query, key, value)),
        (None, None, cu_seq_q, cu_seq_k, seqused_k),
        (max_q, max_k),
        window,
        True,
        scale,
        softcap,
        0.0,
        want_lse,
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if want_lse else out


def _varlen_obstacle(
    packed: tuple[Any, ...], seqused_k: Any, block_table: Any, enable_gqa: Any, scale: Any
) -> str | None:
    """Why the kernels do not cover this call of packed documents."""
    query, key, value, cu_seq_q, cu_seq_k, *lengths = packed
    if block_table is not None:
        return "keys in pages"
    if not all(isinstance(x, Tensor) for x in packed[:5]):
        return "an argument is not a tensor"
    if not query.dim() == key.dim() == value.dim() == 3 or key.shape[0] != value.shape[0]:
        return f"shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
    if not all(isinstance(length, (int, torch.SymInt)) and not isinstance(length, bool) for length in lengths):
        return "a length is not an int"
    starts = [cu_seq_q, cu_seq_k] if seqused_k is None else [cu_seq_q, cu_seq_k, seqused_k]
    for x in starts:
        if not isinstance(x, Tensor) or x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
            return "starts of documents that are not int32 vectors"
    if cu_seq_q.shape != cu_seq_k.shape or cu_seq_q.shape[0] < 1:
        return "different numbers of documents"
    if seqused_k is not None and seqused_k.shape[0] != cu_seq_q.shape[0] - 1:
        return f"{seqused_k.shape[0]} lengths for {cu_seq_q.shape[0] - 1} documents"
    return (
        _dtype_obstacle(query, key, value)
        or _head_obstacle(query, key, value, 1, enable_gqa is True)
        or _scale_obstacle(scale)
    )


def _torch_varlen(options: dict[str, Any]) -> Callable[..., Any] | None:
    """PyTorch's varlen_attn with the options in use; None where this version of it does not know one of them."""
    from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn

    off = {"window_size": _UNLIMITED, "enable_gqa": False}
    given = {name: value for name, value in options.items() if value is not None and value != off.get(name)}
    if given.keys() - inspect.signature(torch_varlen_attn).parameters.keys():
        return None
    return partial(torch_varlen_attn, **given)
