"""The norms: rows of numbers far from 0, a weight, a bias, a residual."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import configs, norm
from ._kernel import Arguments, Case, Draw, Kernel, drawn
from ._rows import LARGE, OTHER_DTYPE, QUICK, flops_of, small


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    residual: bool = False,
    bias: bool = False,
    weight: bool = True,
    mixed: bool = False,
    eps: float = 1e-5,
) -> Arguments:
    """Arguments of the norms; `mixed` gives the parameters another dtype.

    The input's mean is far from 0 against its spread: a variance without the mean subtracted, or one lost to
    cancellation, shows.
    """
    other = OTHER_DTYPE[draw.dtype] if mixed else draw.dtype
    arguments: Arguments = {"input": draw(rows, columns, scale=0.7, shift=1.5)}
    if residual:
        arguments["residual"] = draw(rows, columns, scale=2.0, shift=-0.5, dtype=other)
    arguments["normalized_shape"] = (columns,)
    arguments["weight"] = draw(columns, shift=0.3, dtype=other) if weight else None
    if bias:
        arguments["bias"] = draw(columns, dtype=other) if weight else None
    return {**arguments, "eps": eps}


def _traffic(residual: bool) -> Callable[[Case, torch.dtype, bool], int]:
    def traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
        # Forward: x in, y out; x, r in, h, y out. Backward: x, dy in, dx out; h, dy, dh in, dx out.
        passes = 4 if residual else (3 if backward else 2)
        return case["rows"] * case["columns"] * passes * dtype.itemsize

    return traffic


_SMALL = small({"weight": False}, {"mixed": True}, {"eps": 0.1})
# One row length for each tile of the tables, and one past the last, which is walked in blocks.
_TILES = tuple(config.block_n for config in configs.NORM_FORWARD["generic"])
_COMPILED = (
    *({"rows": 4096, "columns": columns} for columns in (*_TILES, 2 * _TILES[-1])),
    # Two dtypes need the most registers, which are scarce in the widest tiles.
    *({"rows": 4096, "columns": columns, "mixed": True} for columns in _TILES[-3:]),
)


def _norm(
    fused: Callable[..., Any], reference: Callable[..., Any], flops: int, residual: bool = False, bias: bool = False
) -> Kernel:
    return Kernel(
        fused,
        reference,
        partial(_inputs, residual=residual, bias=bias),
        _SMALL,
        QUICK,
        LARGE,
        _COMPILED,
        _traffic(residual),
        flops_of(flops),
    )


KERNELS = (
    _norm(norm.rms_norm, norm.rms_norm_reference, 4),
    _norm(norm.add_rms_norm, norm.add_rms_norm_reference, 5, residual=True),
    _norm(norm.layer_norm, norm.layer_norm_reference, 7, bias=True),
    _norm(norm.add_layer_norm, norm.add_layer_norm_reference, 8, residual=True, bias=True),
)
