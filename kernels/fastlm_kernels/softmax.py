"""Softmax and its logarithm along one dimension.

    softmax(x)_i     = exp(x_i - max x) / sum_j exp(x_j - max x)
    log_softmax(x)_i = x_i - max x - log sum_j exp(x_j - max x)

One read and one write per element when a row fits on chip; the output is saved for backward. A row of nothing but
-inf gives NaN, as PyTorch's does: the rule "fully masked rows give 0" is attention's alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import without_kernel


@without_kernel("softmax has no kernel yet: PyTorch's operator")
def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.nn.functional.softmax` over `dim`: any shape; the result in `dtype`, else in input's."""
    # One more frame stands between the caller and PyTorch's warning about a missing `dim`.
    return F.softmax(input, dim, _stacklevel + 1, dtype)  # pyright: ignore[reportArgumentType]


@without_kernel("log_softmax has no kernel yet: PyTorch's operator")
def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.log_softmax` over `dim`: any shape; the result in `dtype`, else in input's."""
    return F.log_softmax(input, dim, _stacklevel + 1, dtype)  # pyright: ignore[reportArgumentType]
