"""Cross-entropy of hidden states under a head, whose logits are never all there."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ._kernel import Arguments, Case, Draw, Kernel, drawn


@drawn
def _inputs(
    draw: Draw,
    *,
    rows: int,
    columns: int,
    classes: int = 40,
    bias: bool = False,
    weight: bool = False,
    **options: Any,
) -> Arguments:
    """Hidden states (rows, columns) and a head of `classes`; one token in seven is ignored, the first one never."""
    arguments: Arguments = {"input": draw(rows, columns)}
    arguments["linear_weight"] = draw(classes, columns, scale=2.0 / math.sqrt(max(columns, 1)))
    arguments["target"] = draw.classes(rows, classes)
    arguments["target"][5::7] = -100
    if bias:
        arguments["linear_bias"] = draw(classes)
    if weight:
        arguments["weight"] = draw(classes).detach().abs_().add_(0.2)
    return {**arguments, **options}


def _traffic(case: Case, dtype: torch.dtype, backward: bool) -> int:
    # Forward: x and W in. Backward: their gradients out. The logits need not leave the chip.
    return (case["rows"] + case.get("classes", 40)) * case["columns"] * dtype.itemsize


def _flops(case: Case, backward: bool) -> int:
    return (4 if backward else 2) * case["rows"] * case.get("classes", 40) * case["columns"]


_EVERY_TERM = {"bias": True, "weight": True, "label_smoothing": 0.1, "z_loss": 0.05, "softcap": 4.0}
_SMALL = (
    {"rows": 1, "columns": 2, "classes": 2},
    {"rows": 7, "columns": 24, "classes": 100},
    {"rows": 33, "columns": 17, "reduction": "sum", "num_items": 23},
    {"rows": 12, "columns": 16, "reduction": "none", "bias": True},
    {"rows": 9, "columns": 12, **_EVERY_TERM},
    {"rows": 9, "columns": 12, "reduction": "none", **_EVERY_TERM},
)
_LARGE = (
    *(
        {"rows": rows, "columns": columns, "classes": classes}
        for rows in (8192, 65536)
        for columns in (768, 2048, 4096)
        for classes in (50304, 128256)
    ),
    # In chunks, and by blocks of classes. Of 64k tokens PyTorch would hold 206 GB of logits: in 16 bits, in 32 twice.
    *({"rows": 8192, "columns": columns, "classes": 262144} for columns in (2048, 4096)),
)
_COMPILED = tuple(
    {"rows": 512, "columns": 768, "classes": 50304, "reduction": reduction, **terms}
    for reduction in ("mean", "none")
    for terms in ({}, _EVERY_TERM)
)


KERNELS = (
    Kernel(
        linear_cross_entropy,
        linear_cross_entropy_reference,
        _inputs,
        _SMALL,
        ({"rows": 128, "columns": 64, "classes": 512}, {"rows": 256, "columns": 128, "classes": 1024}),
        _LARGE,
        _COMPILED,
        _traffic,
        _flops,
    ),
)
