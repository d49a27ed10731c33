"""Cross-entropy of logits: confident and ignored tokens, every option."""

from __future__ import annotations

from typing import Any

import torch

from .. import configs
from ..cross_entropy import cross_entropy, cross_entropy_reference
from ._kernel import Arguments, Case, Draw, Kernel, drawn
from ._rows import flops_of, small


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    weight: bool = False,
    **options: Any,
) -> Arguments:
    """Arguments of cross_entropy: `rows` tokens, `columns` classes; options by the function's own names.

    Every third token is confident, as most are late in training; one in five is ignored, never the first.
    """
    x = draw(rows, columns, scale=3.0)
    target = draw.classes(rows, columns)
    if not draw.empty:
        peaks = x.detach()[::3]
        peaks.scatter_(1, target[::3, None], 9.0)
        target[1::5] = -100
    weights = draw(columns).detach().abs() + 0.1 if weight else None
    return {"input": x, "target": target, "weight": weights, **options}


def _traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: logits in. Backward: logits in, their gradient out. Ignored rows are not counted as saved.
    return case["rows"] * case["columns"] * (2 if backward else 1) * dtype.itemsize


_OPTIONS: tuple[Case, ...] = (
    {"weight": True},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"weight": True, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 5.0, "num_items": 3},
    {"z_loss": 0.1, "reduction": "none"},
    {"reduction": "sum"},
)
_LARGE: tuple[Case, ...] = (
    *({"rows": rows, "columns": columns} for rows in (1, 128, 8192) for columns in (50304, 128256, 262144)),
    {"rows": 65536, "columns": 50304},
    *({"rows": 65536, "columns": columns} for columns in (256, 1024, 8192)),
)
_COMPILED: tuple[Case, ...] = (
    *({"rows": 4096, "columns": config.block_n} for config in configs.CROSS_ENTROPY["generic"]),
    {"rows": 65536, "columns": 50304},
    {"rows": 4096, "columns": 50257},
    *({"rows": 4096, "columns": columns, **options} for columns in (1024, 50304) for options in _OPTIONS),
)


KERNELS = (
    Kernel(
        cross_entropy,
        cross_entropy_reference,
        _inputs,
        small(*_OPTIONS),
        ({"rows": 128, "columns": 256}, {"rows": 128, "columns": 5024}),
        _LARGE,
        _COMPILED,
        _traffic,
        # Multiply-add, power, sum; multiply-adds and power, twice.
        flops_of(4),
    ),
)
