"""Attention of transformers models on this package's functions: one attention function and one mask function.

transformers looks both up by the name in `config._attn_implementation`. The mask function never builds a T x T mask for
what the kernels know by position: it returns None, the padding mask (B, S), or where packed documents begin. A model's
layers hand the result to the attention function, with their own scale, window and soft-cap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _runtime
from .attention import scaled_dot_product_attention, varlen_attn

# A copied package registers a key of its own.
KEY = _runtime.NAMESPACE
# What only a model's own attention computes: sinks of gpt-oss, biases of T5.
_FOREIGN = ("s_aux", "position_bias")


class Documents(NamedTuple):
    """Packed documents of a batch whose rows lie one after another: where each begins, and the longest's length."""

    starts: Tensor
    longest: int


def register() -> None:
    """Give transformers our two functions under KEY: the one effect on the process, harmless when repeated."""
    import transformers

    # Where documents lie is read from the device: no compiled function does that. Here, for it loads the compiler.
    global _find_documents, _transformers_4
    _find_documents = torch.compiler.disable(_documents)  # type: ignore[assignment]
    _transformers_4 = transformers.__version__.startswith("4.")
    transformers.AttentionInterface.register(KEY, attention)
    transformers.AttentionMaskInterface.register(KEY, mask)


def no_mask(like: Tensor) -> Tensor:
    """A mask that transformers passes on as it is (it has 4 dimensions) and `attention` reads as none."""
    return like.new_empty((1, 1, 1, 0), dtype=torch.bool)


def mask(**given: Any) -> Tensor | Documents | None:
    """transformers' mask for `attention`: None, the keys that take part (B, S), or the batch's packed documents.

    Where positions alone do not say it (keys of a static cache that are not yet written, a mask function of the
    user's) it is the bool mask of transformers' "sdpa", (B, 1, T, S). `given` is what transformers gives every mask
    function, by keyword; version 4 gives cache_position instead of q_length and q_offset.
    """
    kv_length, kv_offset = given["kv_length"], given["kv_offset"]
    bidirectional = "allow_is_bidirectional_skip" in given
    if given.get("use_vmap") or not (bidirectional or _ends_together(**given)):
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    keys = given["attention_mask"]
    if keys is None:
        # transformers looks for documents where there is neither a mask nor a cache, and says so by this switch alone.
        packed = not given["allow_is_causal_skip"] and not bidirectional and _queries(**given) == kv_length
        return _find_documents(**given) if packed else None
    keys = keys[:, kv_offset : kv_offset + kv_length]
    if keys.shape[1] < kv_length:
        keys = torch.nn.functional.pad(keys, (0, kv_length - keys.shape[1]))
    return padding(keys)


def padding(keys: Tensor) -> Tensor | None:
    """keys (B, S) as `attention` reads them, None where all take part and the host may ask."""
    keys = keys.bool()
    return None if _may_read(keys) and bool(keys.all()) else keys


def _queries(*, q_length: int | None = None, cache_position: Tensor | None = None, **_: Any) -> int:
    return int(q_length or 0) if cache_position is None else cache_position.shape[0]


def _ends_together(*, kv_length: int, kv_offset: int, **given: Any) -> bool:
    """Whether the last query stands at the last key. A static cache has more keys, and counts on the device."""
    length, offset, positions = _queries(**given), given.get("q_offset", 0), given.get("cache_position")
    if positions is not None:
        # Equal lengths are no cache, or one that is filled at once: nothing to ask the device.
        return length == kv_length or int(positions[-1]) + 1 == kv_offset + kv_length
    return not isinstance(offset, Tensor) and offset + length == kv_offset + kv_length


def _may_read(tensor: Tensor) -> bool:
    """Whether the host may wait for a value: not in a compiled function, nor while a CUDA graph is captured."""
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _documents(*, batch_size: int, kv_length: int, mask_function: Any, **given: Any) -> Documents | None:
    """The documents that mask_function keeps apart, None for one a row. Asks it for T pairs of neighbours a row."""
    positions = given.get("cache_position")
    device = given.get("device") if positions is None else positions.device
    rows = torch.arange(batch_size, device=device)[:, None]
    at = torch.arange(1, kv_length, device=device)[None]
    begins = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    # Neighbours see each other inside a document alone.
    begins[:, 1:] = ~mask_function(rows, rows.new_zeros(()), at, at - 1)
    starts = begins.flatten().nonzero().flatten()
    if starts.shape[0] == batch_size:
        return None
    starts = torch.cat([starts, starts.new_full((1,), begins.numel())]).int()
    return Documents(starts, int(starts.diff().max()))


_find_documents: Callable[..., Any] = _documents
_transformers_4 = False


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Documents | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, H, T, D), key and value (B, Hk, S, D); (B, T, H, D) and no weights.

    attention_mask is what `mask` returned, or a mask (B, 1 or H, T, S) of the user's; ValueError for a model's sinks.
    """
    _check_foreign(kwargs)
    causal = _is_causal(module, is_causal)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "enable_gqa": query.shape[1] != key.shape[1]}
    # A causal window counts a query's own position; transformers' masks of the others do not.
    left = -1 if sliding_window is None or key.shape[2] <= sliding_window else sliding_window - causal
    window = (left, 0 if causal else left)
    if kwargs.get("cu_seq_lens_q") is not None:
        longest = max(kwargs.get("max_length_q") or query.shape[2], kwargs.get("max_length_k") or key.shape[2])
        attention_mask = Documents(kwargs["cu_seq_lens_q"], longest)
    if isinstance(attention_mask, Documents):
        return _packed(query, key, value, attention_mask, window, dropout, options), None
    options["dropout_p"] = dropout
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.numel() > 0:
        options |= _read_mask(attention_mask, query.shape[2])
    else:
        if attention_mask is not None and attention_mask.dim() == 2:
            options["key_mask"] = attention_mask.bool()
        # A single query is the last: it sees every key that its window holds.
        options["is_causal"] = causal and query.shape[2] > 1
        options["causal_align"] = "top_left" if query.shape[2] == key.shape[2] else "bottom_right"
        options["window_size"] = (left, -1 if causal else left)
    return scaled_dot_product_attention(query, key, value, **options).transpose(1, 2), None


def _check_foreign(kwargs: dict[str, Any]) -> None:
    # Version 5 takes masks of heads, and reads none.
    for name in (*_FOREIGN, "head_mask") if _transformers_4 else _FOREIGN:
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: the patched attention does not know it; patch with attention=False")


def _is_causal(module: Any, told: bool | None) -> bool:
    if told is None or _transformers_4:
        # There GPT-2 tells False wherever there is a mask, in which it expects to find the triangle.
        return getattr(module, "is_causal", True) and not getattr(module, "is_cross_attention", False)
    return bool(told)


def _read_mask(mask: Tensor, queries: int) -> dict[str, Any]:
    """A mask of 4 dimensions, which holds everything; of one query over all heads it is a mask of the keys."""
    if mask.dtype == torch.bool and queries == mask.shape[1] == mask.shape[2] == 1:
        return {"key_mask": mask[:, 0, 0]}
    return {"attn_mask": mask}


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    window: tuple[int, int],
    dropout: float,
    options: dict[str, Any],
) -> Tensor:
    """Attention inside documents that lie one after another through the batch's rows: (B, T, H, D)."""
    batch, _, length, _ = query.shape
    starts, longest = documents
    if dropout > 0.0:
        # The function of packed documents has no dropout: a mask says which keys are of a query's own.
        at = torch.arange(batch * length, device=query.device)
        document = torch.searchsorted(starts.to(at), at, right=True).view(batch, 1, length)
        same = document[..., None] == document[:, :, None]
        out = scaled_dot_product_attention(query, key, value, same, dropout, window_size=window, **options)
        return out.transpose(1, 2)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    starts = starts.int()
    out = varlen_attn(q, k, v, starts, starts, longest, longest, window_size=window, **options)
    return out.unflatten(0, (batch, length))
