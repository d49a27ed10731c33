"""Which attention weights a seed drops, in PyTorch's operators: the mask of the kernels' `kept_by`, bit for bit.

Public: a model that drops elsewhere too takes `hash32`, so that all its masks come from one family of seeds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def check_dropout_seed(dropout_seed: Any, query: Tensor) -> None:
    """Raise ValueError unless `dropout_seed` is None, an int64 (B,), or one int64 for all rows of the batch."""
    if dropout_seed is None:
        return
    if not isinstance(dropout_seed, Tensor):
        raise ValueError(f"dropout_seed: got {dropout_seed!r}; give a torch.int64 tensor (B,), or None")
    shapes = ((), (1,), (query.shape[0] if query.dim() == 4 else 1,))
    fits = tuple(dropout_seed.shape) in shapes and query.dim() in (3, 4) and dropout_seed.device == query.device
    if dropout_seed.dtype != torch.int64 or not fits:
        raise ValueError(
            f"dropout_seed: got {dropout_seed.dtype} {tuple(dropout_seed.shape)} on {dropout_seed.device} for query "
            f"{tuple(query.shape)} on {query.device}; give torch.int64 (B,), a seed for each row of the batch, or a "
            "single one, on the same device, with (B, H, T, D) inputs"
        )


def hash32(x: Tensor) -> Tensor:
    """Mix the low 32 bits of each int64: every input bit reaches every output bit. -> int64 in [0, 2^32).

    Multiply and xor-shift (C. Wellons' hash-prospector found the constants); in int64, where no product overflows.
    """
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def kept_weights(dropout_seed: Tensor, weights: Tensor, dropout_p: float) -> Tensor:
    """Which of the weights (B, H, L, S) or (H, L, S) stay: bool, a function of seed, head, query, key and share alone.

    A weight's word, a hash of those of its query and its key, must reach dropout_p of 2^32.
    """
    heads, rows, cols = (torch.arange(n, device=weights.device) for n in weights.shape[-3:])
    seed = dropout_seed.reshape(-1, 1, 1, 1) if weights.dim() == 4 else dropout_seed.reshape(1, 1, 1)
    row_words = hash32(hash32(hash32(seed) ^ heads.view(-1, 1, 1)) ^ rows.view(-1, 1))
    word = hash32(row_words ^ hash32(hash32(seed >> 32) ^ cols))
    # The share in fp32, as kernels receive it: exact once multiplied.
    limit = torch.full((), dropout_p, dtype=torch.float32, device=weights.device) * 2.0**32
    return word >= limit.to(torch.int64)
