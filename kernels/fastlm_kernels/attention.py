"""Attention: for each query a softmax over the keys it may see, and the mean of their values under it.

For one head, q (L, D), k (S, D), v (S, E), query i standing at position p_i among the keys:

    s_ij  = scale * q_i . k_j;   s_ij = softcap * tanh(s_ij / softcap) with a cap;   s_ij += mask_ij with a float mask
    j is visible to i   if   p_i - left <= j <= p_i + right,  j <= p_i when causal,  key_mask_j,  mask_ij
    lse_i = log sum_{visible j} exp(s_ij)
    out_i = sum_{visible j} exp(s_ij - lse_i) v_j;   0, with lse_i = -inf, where nothing is visible

    causal_align "top_left": p_i = i, as PyTorch's is_causal;  "bottom_right": p_i = i + S - L, the last query at the
    last key. It places the window too.

FLOPs: 4 L S D a head forward, 10 L S D backward, half of it when causal. Bytes: PyTorch's fused operators read q, k, v
and write out, and save lse for backward; the explicit form below, which serves `softcap` and `return_lse`, holds
L x S scores a head.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_softcap, soft_cap
from ._runtime import without_kernel

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
    if causal_align not in _ALIGNMENTS:
        raise ValueError(f"causal_align: got {causal_align!r}; give 'top_left' or 'bottom_right'")
    plain_positions = window == _UNLIMITED and (not is_causal or causal_align == "top_left")
    explicit = softcap is not None or return_lse
    if plain_positions and key_mask is None and not explicit:
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


@without_kernel("attention has no kernel yet: PyTorch's operators")
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
    deterministic: False permits a faster backward that is not bitwise repeatable; PyTorch's operators have no choice.

    Our options raise ValueError, the others PyTorch's errors.
    """
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


@without_kernel("attention has no kernel yet: PyTorch's operators")
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
    lse (H, Tq) in fp32 (float64 for float64). num_splits concerns GPU kernels alone.

    Half precision on a GPU takes PyTorch's operator, everything else one call per document.
    """
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
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and softcap is None and not return_lse:
        torchs = _torch_varlen(options)
        if torchs is not None:
            return torchs(*packed)
    return varlen_attn_reference(
        *packed, **options, softcap=softcap, return_lse=return_lse, deterministic=deterministic
    )


def _torch_varlen(options: dict[str, Any]) -> Callable[..., Any] | None:
    """PyTorch's varlen_attn with the options in use; None where this version of it does not know one of them."""
    from torch.nn.attention.varlen import varlen_attn as torch_varlen_attn

    off = {"window_size": _UNLIMITED, "enable_gqa": False}
    given = {name: value for name, value in options.items() if value is not None and value != off.get(name)}
    if given.keys() - inspect.signature(torch_varlen_attn).parameters.keys():
        return None
    return partial(torch_varlen_attn, **given)
