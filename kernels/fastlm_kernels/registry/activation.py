"""The activations, of one tensor and gated ones of two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .. import activation
from ._kernel import Arguments, Case, Draw, Kernel, drawn
from ._rows import LARGE, QUICK, flops_of, with_extremes


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    names: tuple[str, ...] = ("input",),
    bf16_bound: float = 20.0,
    halves: bool = False,
    approximate: str | None = None,
) -> Arguments:
    """Arguments called `names` of the activations; in `halves` they are parts of tensors with rows twice as long.

    bf16_bound  no larger number in bf16: Triton's interpreter cuts results off there instead of rounding them, which
                for an output close to 1 is more than all that is left of the derivative
    """
    tensors = [draw(rows, columns, scale=2.0) for _ in names]
    tensors = [with_extremes(values) for values in tensors]
    if draw.dtype == torch.bfloat16:
        tensors = [values.detach().clamp_(-bf16_bound, bf16_bound).requires_grad_() for values in tensors]
    if halves:
        wide = torch.cat([values.detach() for values in (tensors * 2)[:2]], dim=1)
        tensors = [part.requires_grad_() for part in wide.detach().chunk(2, 1)[: len(names)]]
    arguments: Arguments = dict(zip(names, tensors, strict=True))
    return arguments if approximate is None else {**arguments, "approximate": approximate}


def _traffic(passes: int) -> Callable[[Case, torch.dtype, bool], int]:
    def traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
        # One tensor: x in, y out; x, dy in, dx out. Two: g, u in, y out; g, u, dy in, dg, du out.
        tensors = passes + (passes - 1 if backward else 0)
        return case["rows"] * case["columns"] * tensors * dtype.itemsize

    return traffic


_SMALL: tuple[Case, ...] = (
    {"rows": 1, "columns": 1},
    {"rows": 3, "columns": 5},
    {"rows": 11, "columns": 1023},
    {"rows": 9, "columns": 96, "halves": True},
)
_COMPILED: tuple[Case, ...] = (
    {"rows": 4096, "columns": 1024},
    {"rows": 4096, "columns": 768, "halves": True},
    {"rows": 4096, "columns": 2048, "halves": True},
)
_GELU_FORMS: tuple[Case, ...] = ({"approximate": "tanh"},)


def _activation(
    fused: Callable[..., Any], reference: Callable[..., Any], flops: int, options: tuple[Case, ...] = (), **fixed: Any
) -> Kernel:
    passes = 1 + len(fixed.get("names", ("input",)))
    return Kernel(
        fused,
        reference,
        partial(_inputs, **fixed),
        _SMALL + tuple({"rows": 6, "columns": 130, **case} for case in options),
        QUICK,
        LARGE,
        _COMPILED + tuple({"rows": 4096, "columns": 1024, **case} for case in options),
        _traffic(passes),
        flops_of(flops),
    )


KERNELS = (
    _activation(activation.gelu, F.gelu, 26, _GELU_FORMS),
    _activation(activation.silu, F.silu, 4),
    # Beyond these bf16 holds no number between the output and 1.
    _activation(activation.sigmoid, F.sigmoid, 3, bf16_bound=5.0),
    _activation(activation.tanh, F.tanh, 14, bf16_bound=2.5),
    _activation(activation.relu_squared, activation.relu_squared_reference, 2, names=("x",)),
    _activation(activation.swiglu, activation.swiglu_reference, 5, names=("gate", "up")),
    _activation(activation.geglu, activation.geglu_reference, 27, _GELU_FORMS, names=("gate", "up")),
)
