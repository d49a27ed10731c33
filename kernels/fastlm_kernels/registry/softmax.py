"""Softmax and its logarithm over the last axis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .. import configs
from ..softmax import log_softmax, softmax
from ._kernel import Arguments, Case, Draw, Kernel, drawn
from ._rows import LARGE, QUICK, flops_of, small, with_extremes


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    masked: bool = False,
    out: torch.dtype | None = None,
) -> Arguments:
    """Arguments of the softmaxes; `masked` rows begin with -inf, `out` is the result's dtype."""
    x = with_extremes(draw(rows, columns, scale=3.0))
    if draw.dtype == torch.bfloat16:
        # As in the activations: an output that takes nearly the whole row.
        x.detach().clamp_(-20.0, 4.0)
    if masked:
        x.detach()[:, : columns // 2] = -math.inf
    return {"input": x, "dim": -1, "dtype": out}


def _traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x in, y out. Backward: y, dy in, dx out.
    out = case.get("out", dtype).itemsize
    return case["rows"] * case["columns"] * (dtype.itemsize + (2 if backward else 1) * out)


_TILES = tuple(config.block_n for config in configs.SOFTMAX_FORWARD["generic"])
_COMPILED = (
    *({"rows": 4096, "columns": columns} for columns in (*_TILES, 2 * _TILES[-1])),
    *({"rows": 4096, "columns": columns, "out": torch.float32} for columns in (1024, _TILES[-1])),
)
# Attention scores and vocabularies.
_LONG = tuple({"rows": 4096, "columns": columns} for columns in (16384, 50304, 128256, 262144))


def _softmax(fused: Callable[..., Any], reference: Callable[..., Any], *options: Case) -> Kernel:
    return Kernel(fused, reference, _inputs, small(*options), QUICK, LARGE + _LONG, _COMPILED, _traffic, flops_of(5))


KERNELS = (
    _softmax(softmax, F.softmax, {"masked": True}, {"out": torch.float32}),
    _softmax(log_softmax, F.log_softmax, {"out": torch.float32}),
)
