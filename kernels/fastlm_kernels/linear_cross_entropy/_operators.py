"""The forward and the two backwards, their registration and autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._rows import accumulator
from .._runtime import Operator
from ..cross_entropy import LSE, ROW_VALUES, Options, autocast_is_on, launch_gradient, launch_reduce, launch_rows
from ._scale import fake_scale, launch_scale
from ._walk import Problem, empty_gradients, gradients_by_classes, mean_is_defined, prepare, sum_dtypes, token_chunks


def without_autocast(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The products below choose their dtypes themselves; their operands were cast before the operator."""

    @functools.wraps(launcher)
    def run(x: Tensor, *rest: Any) -> Any:
        if not autocast_is_on(x):
            return launcher(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return launcher(x, *rest)

    return run


@without_autocast
def _launch_forward(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    num_items: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    classes: int,
    needs: Sequence[bool],
    save_lse: bool,
) -> tuple[Tensor, ...]:
    """(loss, z, denominator, dx, dW, db, lse): the gradients in `needs`, unscaled; lse empty if not saved."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    problem, plan, buffer, grads = prepare(
        Problem(x, linear_weight, linear_bias, target, weight, options, classes), needs
    )
    rows = torch.empty(ROW_VALUES, x.shape[0], dtype=accumulator(x.dtype)[0], device=x.device)
    in_one_pass = any(needs) and plan.mode == "tokens"
    by_weights = any(needs) and reduction == "mean" and num_items is None
    factor = mean_is_defined(problem) if by_weights else None
    for start, stop in token_chunks(x.shape[0], plan):
        chunk = problem.of_tokens(start, stop)
        logits = chunk.logits(buffer)
        counted = logits[:, :classes]
        gradient = counted if in_one_pass else None
        launch_rows(counted, chunk.target, weight, options, rows[:, start:stop], gradient, factor)
        if in_one_pass:
            grads.of_tokens(start, stop).add(logits, chunk, dx_begun=False, dw_begun=start > 0)
    if any(needs) and not in_one_pass:
        gradients_by_classes(problem, rows[LSE], factor, plan, buffer, grads)
    lse = rows[LSE].clone() if save_lse else rows.new_empty(0)
    if reduction == "none":
        return rows[0].clone(), rows[1].clone(), rows.new_empty(0), *grads, lse
    return *launch_reduce(rows, reduction, num_items), *grads, lse


def _fake_forward(x: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    reduction, needs, save_lse = rest[4], rest[-2], rest[-1]
    rows = torch.empty(0, dtype=accumulator(x.dtype)[0], device=x.device)
    grads = empty_gradients(x, linear_weight, sum_dtypes(x, linear_weight), needs)
    shape, denominator = ((x.shape[0],), (0,)) if reduction == "none" else ((), ())
    lse = rows.new_empty((2, x.shape[0]) if save_lse else (0,))
    return rows.new_empty(shape), rows.new_empty(shape), rows.new_empty(denominator), *grads, lse


@without_autocast
def _launch_backward(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    classes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db) in x's dtype, from lse and one upstream gradient for each token; those not in `needs` empty."""
    options = Options(ignore_index, label_smoothing, z_loss, softcap)
    problem, plan, buffer, grads = prepare(
        Problem(x, linear_weight, linear_bias, target, weight, options, classes), needs
    )
    if plan.mode == "classes":
        gradients_by_classes(problem, lse, grad, plan, buffer, grads)
    for start, stop in token_chunks(x.shape[0], plan) if plan.mode == "tokens" else ():
        chunk = problem.of_tokens(start, stop)
        logits = chunk.logits(buffer)
        counted = logits[:, :classes]
        inputs = (counted, chunk.target, weight, options, lse[:, start:stop], counted)
        launch_gradient(*inputs, upstream=grad[start:stop])
        grads.of_tokens(start, stop).add(logits, chunk, dx_begun=False, dw_begun=start > 0)
    return grads.dx.to(x.dtype), grads.dw.to(x.dtype), grads.db.to(x.dtype)


def _fake_backward(
    grad: Tensor, lse: Tensor, x: Tensor, linear_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw, db = empty_gradients(x, linear_weight, (x.dtype, x.dtype), rest[-1])
    return dx, dw, db.to(x.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, linear_weight, linear_bias, target, weight, _, reduction, *options, _, _ = inputs
    _, z, denominator, dx, dw, db, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(z, denominator, dx, dw, db, lse)
    ctx.by_token, ctx.options, ctx.dtype = reduction == "none", options, x.dtype
    # Formed already: x and W need not be kept.
    kept = (lse, x, linear_weight, linear_bias, target, weight) if ctx.by_token else (denominator, dx, dw, db)
    ctx.save_for_backward(*kept)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    rest = (None,) * 11
    if grad is None:
        return (None, None, None, *rest)
    if ctx.by_token:
        grads = linear_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    else:
        grads = linear_cross_entropy_scale(grad, *ctx.saved_tensors, ctx.dtype)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *rest)


linear_cross_entropy_forward = Operator(
    "linear_cross_entropy_forward(Tensor x, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor? weight,"
    " Tensor? num_items, str reduction, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap,"
    " SymInt classes, bool[] needs, bool save_lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
    _setup_context,
    _backward,
)
linear_cross_entropy_backward = Operator(
    "linear_cross_entropy_backward(Tensor grad, Tensor lse, Tensor x, Tensor linear_weight, Tensor? linear_bias,"
    " Tensor target, Tensor? weight, SymInt ignore_index, float label_smoothing, float z_loss, float? softcap,"
    " SymInt classes, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
linear_cross_entropy_scale = Operator(
    "linear_cross_entropy_scale(Tensor grad, Tensor denominator, Tensor dx, Tensor dw, Tensor db, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor)",
    launch_scale,
    fake_scale,
)
