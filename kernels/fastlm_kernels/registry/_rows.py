"""What the entries of functions of rows share: the sizes, and the operations they count."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._kernel import Case

# rows x columns: one, odd and even lengths, several tiles a program, and rows too long for registers.
_SMALL_SIZES = ((1, 1), (3, 5), (70, 64), (9, 100), (5, 768), (2, 1023), (11, 2048), (2, 8300))
_LARGE_SIZES = tuple(
    (rows, columns) for rows in (1, 128, 8192, 65536) for columns in (256, 768, 1024, 2048, 4096, 8192)
)
QUICK = ({"rows": 128, "columns": 256}, {"rows": 128, "columns": 768})
LARGE = tuple({"rows": rows, "columns": columns} for rows, columns in _LARGE_SIZES)
# The dtype of parameters that have not the input's.
OTHER_DTYPE = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}


def small(*extra: Case) -> tuple[Case, ...]:
    """The small sizes, and one more case for each of these options."""
    sizes = tuple({"rows": rows, "columns": columns} for rows, columns in _SMALL_SIZES)
    return sizes + tuple({"rows": 6, "columns": 130, **case} for case in extra)


def flops_of(per_element: int) -> Callable[[Case, bool], int]:
    """Operations of so many an element, twice as many backward."""

    def flops(case: Case, backward: bool) -> int:
        return math.prod((case["rows"], case["columns"], per_element, 2 if backward else 1))

    return flops


def with_extremes(values: Tensor) -> Tensor:
    """The same with exact zeros, numbers close to it and numbers far out among them, requiring grad."""
    flat = values.detach().view(-1)
    for start, value in ((2, 0.0), (4, 20.0), (7, -20.0), (9, 1e-3)):
        flat[start::11] = value
    return flat.view(values.shape).requires_grad_()
