"""Which attention weights a seed drops, in PyTorch's operators: the mask of the kernels' `kept_by`, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Philox 4x32 (Salmon et al. 2011): multipliers and key steps of its rounds.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 7
_WORD = 0xFFFFFFFF


def check_dropout_seed(dropout_seed: Any, query: Tensor) -> None:
    """Raise ValueError unless `dropout_seed` is None, an int64 (B,), or one int64 for all rows of the batch."""
    if dropout_seed is None:
        return
    batch = query.shape[0] if query.dim() == 4 else 1
    if not isinstance(dropout_seed, Tensor):
        raise ValueError(f"dropout_seed: got {dropout_seed!r}; give a torch.int64 tensor (B,), or None")
    fits = dropout_seed.dim() == 0 or tuple(dropout_seed.shape) in ((1,), (batch,))
    if dropout_seed.dtype != torch.int64 or not fits or query.dim() not in (3, 4) or dropout_seed.device != query.device:
        raise ValueError(
            f"dropout_seed: got {dropout_seed.dtype} {tuple(dropout_seed.shape)} on {dropout_seed.device} for query "
            f"{tuple(query.shape)} on {query.device}; give torch.int64 (B,), one seed for each row of the batch, or a "
            "single one, on the same device, with (B, H, T, D) inputs"
        )


def kept_weights(dropout_seed: Tensor, weights: Tensor, dropout_p: float) -> Tensor:
    """Which of the weights (B, H, L, S) or (H, L, S) stay: bool, a function of seed, head, query, key and share alone.

    A batch row's seed is the key and (query, key, head, 0) the counter of a Philox word, which must reach dropout_p of
    2^32. A word is 32 bits in an int64. Whole tensors (all rows, heads, queries and keys) arise from the second round on.
    """
    heads, rows, cols = (torch.arange(n, device=weights.device) for n in weights.shape[-3:])
    c0, c1, c2, c3 = rows[:, None], cols, heads[:, None, None], torch.zeros_like(heads[:1])
    key = dropout_seed.reshape(-1, 1, 1, 1)
    key = key if weights.dim() == 4 else key[0]
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(ROUNDS - 1):
        (high_0, low_0), (high_2, low_2) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    word = _product(c2, _MULTIPLIERS[1])[0] ^ c1 ^ k0
    # The share in fp32, as kernels receive it: exact once multiplied.
    limit = torch.full((), dropout_p, dtype=torch.float32, device=weights.device) * 2.0**32
    return word >= limit.to(torch.int64)


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of word x multiplier: word (multiplier - 2^32), which no int64 overflows, + 2^32 word."""
    part = word * (multiplier - 2**32)
    return (part >> 32) + word, part & _WORD
