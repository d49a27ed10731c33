"""Attention in PyTorch's operators: checks of our keywords, masks, and the definition of both public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._arguments import check_softcap, check_switch, soft_cap
from ._documents import check_longest, check_packing, segments_of, starts_of, used_of
from .dropout import check_dropout_seed, kept_weights

UNLIMITED = (-1, -1)
_FARTHEST = 2**30  # more than any position, and added to one still 32 bits
_ALIGNMENTS = ("top_left", "bottom_right")


def window_of(window_size: Sequence[int] | None) -> tuple[int, int]:
    """(left, right) checked, 2^30 at most; None and any negative side mean unlimited, written -1."""
    if window_size is None:
        return UNLIMITED
    pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not pair or not all(_is_integer(side) for side in window_size):
        raise ValueError(f"window_size: got {window_size!r}; give (left, right), two ints, -1 for an open side")
    left, right = (int(side) for side in window_size)
    return min(max(left, -1), _FARTHEST), min(max(right, -1), _FARTHEST)


def _is_integer(x: Any) -> bool:
    """Whether x is an int or NumPy's."""
    return hasattr(type(x), "__index__") and not isinstance(x, (bool, Tensor))


def packed_window_of(window_size: Sequence[int] | None) -> tuple[int, int]:
    """`window_of` for varlen_attn, where PyTorch has the argument too and raises TypeError for a number."""
    if isinstance(window_size, (int, float)):
        raise TypeError(f"window_size: got {window_size!r}; give (left, right), two ints, -1 for an open side")
    return window_of(window_size)


def check_key_mask(key_mask: Tensor | None, query: Tensor, key: Tensor) -> None:
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


def check_align(causal_align: str) -> None:
    if causal_align not in _ALIGNMENTS:
        raise ValueError(f"causal_align: got {causal_align!r}; give 'top_left' or 'bottom_right'")


def is_plain(
    window: tuple[int, int],
    is_causal: bool,
    causal_align: str,
    softcap: Any,
    key_mask: Any,
    return_lse: bool,
    dropout_seed: Any,
) -> bool:
    """Whether the call uses none of our options, so that it is PyTorch's."""
    positions = window == UNLIMITED and (not is_causal or causal_align == "top_left")
    return positions and softcap is None and key_mask is None and not return_lse and dropout_seed is None


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
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The equations of the module's text, in fp32 (float64 for float64), holding every score: (out, lse)."""
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(
            f"query, key, value: got {query.dtype}, {key.dtype}, {value.dtype}; give one dtype for all three"
        )
    if not query.is_floating_point():
        raise RuntimeError(f"query, key, value: got {query.dtype}; give floating-point numbers")
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
    return _dropped(weights, dropout_p, dropout_seed) @ v, lse


def _dropped(weights: Tensor, dropout_p: float, dropout_seed: Tensor | None) -> Tensor:
    if dropout_seed is None or not 0.0 < dropout_p < 1.0:
        return F.dropout(weights, dropout_p)
    return torch.where(kept_weights(dropout_seed, weights, dropout_p), weights / (1.0 - dropout_p), 0.0)


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
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    deterministic: bool = True,
    dropout_seed: Tensor | None = None,
) -> Any:
    """`scaled_dot_product_attention` in PyTorch's operators: the definition, and the path without a kernel."""
    check_softcap(softcap)
    window = window_of(window_size)
    check_align(causal_align)
    check_switch("return_lse", return_lse)
    check_switch("deterministic", deterministic)
    if not all(isinstance(x, Tensor) for x in (query, key, value)):
        return F.scaled_dot_product_attention(query, key, value)  # raises PyTorch's TypeError
    explicit = softcap is not None or return_lse or (dropout_seed is not None and dropout_p > 0.0)
    if is_plain(window, is_causal, causal_align, softcap, key_mask, return_lse, dropout_seed):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    check_key_mask(key_mask, query, key)
    check_dropout_seed(dropout_seed, query)
    visible = _visible(query, key, is_causal, window, causal_align == "bottom_right", key_mask)
    _check_attn_mask(attn_mask, query)
    mask = _merge_masks(attn_mask, visible)
    if not explicit:
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    out, lse = _without_autocast(query, key, value, mask, dropout_p, scale, enable_gqa, softcap, dropout_seed)
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
    document: int | None,
    starts: list[int] | None,
    used: list[int] | None,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values (S, Hk, D) of one document, out of the packed tensors or out of the pages of its block table.

    Of no document: none, but still part of the graph.
    """
    if block_table is not None:
        if used is None:
            raise ValueError("block_table: needs seqused_k, the number of valid keys of each document")
        pages = block_table[document] if document is not None else slice(0)
        length = used[document] if document is not None else 0
        return key[pages].flatten(0, 1)[:length], value[pages].flatten(0, 1)[:length]
    if document is None or starts is None:
        return key[:0], value[:0]
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
    window_size: tuple[int, int] = UNLIMITED,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Any:
    """`varlen_attn` as one call per document: the definition, and the path where no kernel runs.

    Rows of no document see no key. Reads the cumulative lengths on the host: on a GPU that waits for the device.
    """
    _check_heads(query, key, enable_gqa, block_table is not None)
    check_softcap(softcap)
    window = packed_window_of(window_size)
    check_switch("return_lse", return_lse)
    check_switch("deterministic", deterministic)
    want_lse = return_lse or (return_aux is not None and return_aux.lse)
    check_packing(cu_seq_q, cu_seq_k, seqused_k, block_table, (max_q, max_k))
    q_starts = starts_of("cu_seq_q", cu_seq_q, len(query))
    k_starts = None
    if block_table is None and cu_seq_k is not None:
        k_starts = starts_of("cu_seq_k", cu_seq_k, len(key))
    used = None if seqused_k is None else used_of(seqused_k)
    outs, lses, longest_q, longest_k = [], [], 0, 0
    for begin, end, document in segments_of(q_starts, len(query)):
        k, v = _document_keys(key, value, document, k_starts, used, block_table)
        if document is not None:
            longest_q, longest_k = max(longest_q, end - begin), max(longest_k, len(k))
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
    check_longest("max_q", max_q, longest_q)
    check_longest("max_k", max_k, longest_k)
    packed = torch.cat(outs)
    return (packed, torch.cat([lse[0] for lse in lses], -1)) if want_lse else packed
