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
program in one order. Two runs give the same bits. With deterministic=False the first of the two makes dq as well and
adds it up by atomics, in fp32: 10 L S D, 8 bytes more a channel of dq for every tile of keys that it meets in L2.

In order of reading: `_tiles` (what kernels share), `_forward` and `_decode`, `_backward` with `_backward_keys` and
`_backward_queries` (kernels and their launchers), `_operators` (registration), `_reference`, `_documents` and `dropout`
(the definition in PyTorch's operators), and here the public functions; `_launch` is what launchers share, `_hopper` a
forward that `tune` tries.

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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from .._arguments import check_softcap, check_switch
from .._runtime import with_kernel
from ._launch import Options
from ._operators import attention_backward, attention_forward
from ._reference import (
    UNLIMITED,
    check_align,
    check_key_mask,
    is_plain,
    packed_window_of,
    scaled_dot_product_attention_reference,
    varlen_attn_reference,
    window_of,
)
from .dropout import check_dropout_seed

__all__ = [
    "attention_backward",
    "attention_forward",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_reference",
    "varlen_attn",
    "varlen_attn_reference",
]

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
# In fp32, as kernels take it, more would be 1, and what stays divided by 0.
_MOST_DROPPED = 1.0 - 2.0**-24


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
    if not isinstance(dropout_p, (int, float)) or not 0.0 <= dropout_p <= _MOST_DROPPED:
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
    deterministic: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of 4-d tensors, by the operator; lse is empty if it is not asked for."""
    q, k, v = (x.to(_autocast(x)) for x in tensors)
    if dropout <= 0.0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (q.shape[0],), dtype=torch.int64, device=q.device)
    options = Options(
        *max_lengths,
        *window,
        bottom_right and window != UNLIMITED,
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        float(softcap or 0.0),
        float(dropout),
        deterministic,
    )
    save_lse = return_lse or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    out, lse = attention_forward(q, k, v, *extras, None if seed is None else seed.reshape(-1), *options, save_lse)
    return out, lse * math.log(2.0) if return_lse else lse


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
    window_size: tuple[int, int] = UNLIMITED,
    softcap: float | None = None,
    key_mask: Tensor | None = None,
    causal_align: str = "top_left",
    return_lse: bool = False,
    deterministic: bool = True,
    dropout_seed: Tensor | None = None,
) -> Any:
    """`torch.nn.functional.scaled_dot_product_attention`, with windows, padding masks, soft-cap and log-sum-exp.

    query (B, H, L, D), key (B, H, S, D), value (B, H, S, E), or fewer or more leading dimensions; with enable_gqa key
    and value have Hk heads, a divisor of H. attn_mask bool (True = visible) or float (added), broadcasts to
    (B, H, L, S). Beside is_causal both decide: with our options everywhere, without them on those of PyTorch's backends
    that take the two together. Returns (B, H, L, E) in query's dtype (under
    autocast in autocast's, as PyTorch's does); for query a transposed (B, L, H, D) tensor,
    `out.transpose(1, 2)` is contiguous. A query that sees no key gives 0.

    window_size: (left, right), how many keys before and after a query's own position it sees; -1 = all.
    softcap: scores become softcap * tanh(scores / softcap), before any mask is added.
    key_mask: (B, S) bool, True = the key takes part: padding, in one row per sequence.
    causal_align: where is_causal and the window put the queries if L != S: "top_left" (query i at key i, PyTorch's)
        or "bottom_right" (the last query at the last key).
    return_lse: (out, lse) with lse (B, H, L) the natural log of the summed exponentials, fp32 (float64 for float64),
        differentiable, -inf where a query sees no key.
    deterministic: False permits a backward in one pass, of 5 matrix products instead of 7, that adds up the gradient
        of query by atomics: in fp32, but in any order, so that two runs may differ in the last bits. Heads of more
        than 128 channels take two passes all the same.
    dropout_seed: (B,) int64, what each row of the batch drops with dropout_p: a function of its own seed, head, query
        and key, the same on every path, however rows are put into batches; a single one serves all rows, which then
        drop alike. None: drawn from the default generator.

    The kernel takes fp32, fp16 and bf16, head dimensions up to 256 and bool masks; float masks and all else are
    PyTorch's operator, or with dropout_seed its single operators, which hold L x S scores a head. Dropout equals
    PyTorch's in distribution. Our options raise ValueError, the others PyTorch's errors. Dao 2023, arXiv:2307.08691.
    """
    check_softcap(softcap)
    window = window_of(window_size)
    check_align(causal_align)
    check_switch("return_lse", return_lse)
    check_switch("deterministic", deterministic)
    plain = is_plain(window, is_causal, causal_align, softcap, key_mask, return_lse, dropout_seed)
    obstacle = _obstacle(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, plain)
    if isinstance(query, Tensor) and isinstance(key, Tensor):
        check_key_mask(key_mask, query, key)
        check_dropout_seed(dropout_seed, query)
    if not _runtime.choose(query, key, value, attn_mask, key_mask, dropout_seed, obstacle=obstacle):
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
            dropout_seed=dropout_seed,
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
        deterministic,
        dropout_seed,
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
    window_size: tuple[int, int] = UNLIMITED,
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
    (N, pages) int32 reads keys from pages (P, page, Hk, D). Returns (Tq, H, E); a query that sees no key gives 0, as
    does a row of no document, before cu_seq_q's first number or after its last.

    softcap, deterministic: as in `scaled_dot_product_attention`. return_lse (or return_aux with lse=True): (out, lse),
    lse (H, Tq) in fp32 (float64 for float64). num_splits concerns PyTorch's own kernels alone.

    The kernel takes fp32, fp16 and bf16 without pages and never waits for the device: of starts that leave the tensors
    it takes what lies within, of documents longer than max_q or max_k perhaps not all. Elsewhere half precision on a
    GPU is PyTorch's operator; everything else is one call per document, where such numbers raise ValueError. Starts or
    lengths of another type, dtype or shape raise RuntimeError, as PyTorch's operator does.
    """
    check_softcap(softcap)
    window = packed_window_of(window_size)
    check_switch("return_lse", return_lse)
    check_switch("deterministic", deterministic)
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
        deterministic,
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
    if any(length < 0 for length in lengths):
        return "a negative length"
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

    off = {"window_size": UNLIMITED, "enable_gqa": False}
    given = {name: value for name, value in options.items() if value is not None and value != off.get(name)}
    if given.keys() - inspect.signature(torch_varlen_attn).parameters.keys():
        return None
    return partial(torch_varlen_attn, **given)
