"""Registration and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from .._rows import accumulator, as_rows
from .._runtime import Operator
from ._backward import launch_gradient
from ._forward import launch_forward
from ._launch import Options
from ._reduce import launch_sums
from ._reference import SECOND_BACKWARD


def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    num_items: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, z, lse, denominator): lse (2, rows) as in `launch_rows`; no denominator under "none"."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    rows, classes = logits.shape
    loss, z, lse, denominator = _fake_forward(logits, target, weight, num_items, reduction)
    whole = reduction == "none"
    values = (loss, z, lse.new_empty(rows)) if whole else lse.new_empty((3, rows)).unbind(0)
    outputs = (values[0], values[1], lse, values[2])
    launch_forward(as_rows(logits, classes), target, weight, options, outputs)
    if not whole:
        loss, z, denominator = launch_sums(values, reduction, num_items)
    return loss, z, lse, denominator


def _fake_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, num_items: Tensor | None, reduction: str, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulator(logits.dtype)[0]
    none = reduction == "none"
    shapes: tuple[Any, ...] = ((rows,), (rows,), (2, rows), (0,)) if none else ((), (), (2, rows), ())
    loss, z, lse, denominator = (torch.empty(shape, dtype=dtype, device=logits.device) for shape in shapes)
    return loss, z, lse, denominator


def _backward_launch(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    denominator: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    inplace: bool,
) -> Tensor:
    """The logits' gradient: in their memory if `inplace` and no two of them share an element, else in its own."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    rows, classes = logits.shape
    x = as_rows(logits, classes)
    inplace = inplace and (rows <= 1 or x.stride(0) >= classes)
    # A copy made for its strides is nobody else's.
    ours = x.data_ptr() != logits.data_ptr()
    gradient = x if inplace or ours else _fake_backward(dloss, logits)
    launch_gradient(x, target, weight, options, lse, gradient, dloss, denominator)
    if inplace and not ours:
        torch.autograd.graph.increment_version(logits)
    return gradient


def _fake_backward(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight, _, reduction, *ctx.options, ctx.inplace = inputs
    _, z, lse, denominator = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, lse, denominator)
    ctx.save_for_backward(logits, target, weight, lse, None if reduction == "none" else denominator)
    ctx.used = False


def _backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 9
    if dloss is None:
        return None, *rest
    if ctx.inplace and ctx.used:
        raise RuntimeError(SECOND_BACKWARD)
    ctx.used = True
    logits, target, weight, lse, denominator = ctx.saved_tensors
    # A captured operator writes to none of its inputs.
    inplace = ctx.inplace and not _runtime.capturing(logits)
    return cross_entropy_backward(dloss, logits, target, weight, lse, denominator, *ctx.options, inplace), *rest


cross_entropy_forward = Operator(
    "cross_entropy_forward(Tensor logits, Tensor target, Tensor? weight, Tensor? num_items, str reduction,"
    " SymInt ignore_index, float label_smoothing, float z_loss, float? softcap, bool inplace)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _setup_context,
    _backward,
)
cross_entropy_backward = Operator(
    "cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor lse,"
    " Tensor? denominator, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap, bool inplace)"
    " -> Tensor",
    _backward_launch,
    _fake_backward,
)
