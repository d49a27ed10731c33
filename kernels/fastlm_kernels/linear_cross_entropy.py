"""Linear cross-entropy: the head's matrix product and the loss in one function that never holds all logits.

With x (N, D) hidden states, W (V, D) the head, b its bias, and cross_entropy of its own file:

    logits = x W^T + b
    loss   = cross_entropy(logits, target)
    dx = G W,   dW = G^T x,   db = sum_n G_n         where G = dloss/dlogits, (N, V)

"mean" and "sum" form the gradients in the forward. The tokens are walked in chunks of R rows (6 of 11008 for 64k tokens
of 768 and 50304 classes; `configs.linear_cross_entropy_plan` shows it), all in one buffer:

    logits = x_chunk W^T + b                 rounded to x's dtype, as the unfused product rounds them
    loss, lse, and G written over the logits                                    (cross_entropy's kernel)
    dx_chunk = G W,   dW += G^T x_chunk,   db += sum_n G_n                                (dW, db in fp32)

G is the gradient of the sum over tokens: what "mean" divides by is known only after the last chunk, and the upstream
gradient only in the backward. The backward multiplies the finished sums by upstream / denominator, read on the device,
in fp32: one more pass over dx and dW, and 16-bit gradients neither underflow nor depend on a loss scale. With class
weights a few small operators ask first whether those of the counted tokens sum to 0: all gradients are NaN then, as
PyTorch's are, while with nothing counted they are 0. Only gradients that somebody needs are formed. reduction="none"
has an upstream gradient for each token: it keeps lse, and its backward computes the logits again. Without gradients:
loss and lse alone, the same chunks, the same bits.

Where V x D in fp32 is large (`configs.linear_cross_entropy_by_classes`) dW is not summed over chunks: once every lse is
known, the logits of all tokens are computed again for one block of classes at a time. A block's rows of dW are then one
product, summed inside it in fp32 and stored in their own dtype; dx is summed over the blocks in fp32.

FLOPs: 2 N V D for the loss, 6 with gradients; 8 for "none" with its backward, and by blocks of classes.
Bytes for s-byte dtypes, beside what the products read and write: N V logits read and overwritten, as by the unfused
pair; each chunk but the first reads dW in fp32, each writes it, 8 V D ceil(N / R) - 4 V D in all; scaling (4 + s) V D +
2 s N D. A bias gradient reads G once more. Kept for the backward: dx, dW in fp32; for "none" x, W and lse.
Memory at 64k tokens, D 768, V 50304, bf16: the buffer 1108 MB, dW in fp32 155 MB, dx 101 MB, together a tenth of the
13.2 GB that logits and their gradient take.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _runtime, configs
from ._arguments import check_loss_keywords
from ._rows import accumulator
from ._runtime import Operator, kernel, launch, tl, with_kernel
from .cross_entropy import (
    LSE,
    ROW_VALUES,
    Options,
    autocast_is_on,
    cross_entropy_reference,
    items_on_device,
    launch_gradient,
    launch_reduce,
    launch_rows,
    loss_obstacle,
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Younger than torch 2.11.
_OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", ())


# Reference: plain PyTorch.


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """The conditions that torch.nn.functional.linear_cross_entropy puts on its inputs, as RuntimeErrors too."""
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"linear_weight: got shape {tuple(linear_weight.shape)}; give (classes, in_features) or "
            "(classes, d1, ..., in_features)"
        )
    batches = (1, 2, 3) if linear_weight.dim() == 2 else (2,)
    if input.dim() not in batches:
        raise RuntimeError(
            f"input: got shape {tuple(input.shape)} for linear_weight {tuple(linear_weight.shape)}; give "
            + ("(D,), (N, D) or (B, T, D)" if linear_weight.dim() == 2 else "(N, D)")
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"in_features: got {input.shape[-1]} in input and {linear_weight.shape[-1]} in linear_weight; "
            "their last dimensions must be equal"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"linear_bias: got shape {tuple(linear_bias.shape)}; linear_weight {tuple(linear_weight.shape)} "
            f"calls for {tuple(linear_weight.shape[:-1])}"
        )


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    """input (..., D) times linear_weight (C, d1, ..., D) -> (..., C, d1, ...)."""
    if linear_weight.dim() == 2:
        return F.linear(input, linear_weight, linear_bias)
    classes = linear_weight.shape[:-1]
    flat_bias = None if linear_bias is None else linear_bias.reshape(-1)
    flat = F.linear(input, linear_weight.reshape(math.prod(classes), -1), flat_bias)
    return flat.reshape(*input.shape[:-1], *classes)


def _flatten_tokens(input: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(B, T, D) with targets (B, T) or (B, T, C) as (B*T, D) with (B*T,) or (B*T, C)."""
    tokens = input.shape[:2]
    if target.shape == tokens:
        return input.flatten(0, 1), target.flatten()
    if target.shape == (*tokens, num_classes):
        return input.flatten(0, 1), target.flatten(0, 1)
    raise RuntimeError(
        f"target: got shape {tuple(target.shape)}; input {tuple(input.shape)} with {num_classes} classes calls for "
        f"{tuple(tokens)} (class indices) or {(*tokens, num_classes)} (probabilities)"
    )


def _logits_and_target(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, ignore_index: int | None
) -> tuple[Tensor, Tensor]:
    """Both as `cross_entropy` takes them: the tokens of (B, T, D) one after the other."""
    _check_shapes(input, linear_weight, linear_bias)
    if input.dim() == 3:
        input, target = _flatten_tokens(input, target, linear_weight.shape[0])
    logits = _logits(input, linear_weight, linear_bias)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError(
            f"ignore_index={ignore_index} with a target of the logits' shape {tuple(logits.shape)}: probabilities "
            "ignore nothing; leave ignore_index out, or give class indices"
        )
    return logits, target


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    num_classes: int | None = None,
) -> Any:
    """`linear_cross_entropy` as matrix product and cross-entropy: the definition, and the path without a kernel."""
    _check_options(options)
    _check_num_classes(num_classes, linear_weight, linear_bias)
    head = linear_weight if num_classes is None else linear_weight[:num_classes]
    logits, labels = _logits_and_target(input, head, linear_bias, target, ignore_index)
    loss = cross_entropy_reference(
        logits,
        labels,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        return_z_loss=return_z_loss,
        softcap=softcap,
        num_items=num_items,
    )
    if input.dim() != 3 or reduction != "none":
        return loss
    tokens = target.shape[:2]
    return (loss[0].view(tokens), loss[1].view(tokens)) if return_z_loss else loss.view(tokens)


# Kernel.


@kernel(do_not_specialize=("UPSTREAM", "DENOMINATOR", "M"))
def linear_cross_entropy_scale_kernel(X, UPSTREAM, DENOMINATOR, Y, M, N, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Y = X upstream / denominator, (M, N) without gaps; 0 where nothing was counted."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < M.to(tl.int64) * N
    denominator = tl.load(DENOMINATOR).to(ACC)
    # No token counted: X is 0 throughout, and 0 / 0 must not make it NaN.
    counted = denominator != 0.0
    scale = tl.where(counted, tl.load(UPSTREAM).to(ACC) / tl.where(counted, denominator, 1.0), 0.0)
    x = tl.load(X + at, mask=mask, other=0.0).to(ACC)
    tl.store(Y + at, (x * scale).to(Y.dtype.element_ty), mask=mask)


# Launchers.


def _without_autocast(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The products below choose their dtypes themselves; their operands were cast before the operator."""

    @functools.wraps(launcher)
    def run(x: Tensor, *rest: Any) -> Any:
        if not autocast_is_on(x):
            return launcher(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return launcher(x, *rest)

    return run


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor if matrix products take its strides as they are, else a copy: once, not once a chunk."""
    rows, columns = tensor.stride()
    fits = (columns == 1 and rows >= tensor.shape[1]) or (rows == 1 and columns >= tensor.shape[0])
    return tensor if fits else tensor.contiguous()


def _sums_wider_than_products(tensor: Tensor) -> bool:
    """Whether products of 16-bit matrices may be written, and added up, in fp32: cuBLAS alone does that."""
    return tensor.is_cuda and torch.version.hip is None and not torch.cuda.tunable.is_enabled()


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or out += a b; summed in fp32 and rounded to out's dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif _sums_wider_than_products(a):
        wide = {"out_dtype": out.dtype, "out": out}
        torch.addmm(out, a, b, **wide) if add else torch.mm(a, b, **wide)
    elif a.is_cuda:
        product = torch.mm(a, b)
        out.add_(product) if add else out.copy_(product)
    else:
        _multiply(a.to(out.dtype), b.to(out.dtype), out, add)


class _Problem(NamedTuple):
    """The tensors of a call, or of a chunk of its tokens, or the head's of a block of its classes.

    classes: those that take part; rows of linear_weight from there on are zeros, there for the products' speed alone.
    """

    x: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    options: Options
    classes: int

    def of_tokens(self, start: int, stop: int) -> _Problem:
        """Tokens [start, stop) alone."""
        return self._replace(x=self.x[start:stop], target=self.target[start:stop])

    def of_classes(self, first: int, last: int) -> _Problem:
        """Classes [first, last) alone; `weight` stays that of all classes."""
        bias = None if self.linear_bias is None else self.linear_bias[first:last]
        classes = min(last, self.classes) - min(first, self.classes)
        return self._replace(linear_weight=self.linear_weight[first:last], linear_bias=bias, classes=classes)

    def logits(self, buffer: Tensor) -> Tensor:
        """x W^T + b, in the buffer's memory. Columns past `classes` are 0: they stand as their own gradient."""
        tokens, classes = self.x.shape[0], self.linear_weight.shape[0]
        out = buffer[: tokens * classes].view(tokens, classes)
        if self.linear_bias is None:
            return torch.mm(self.x, self.linear_weight.t(), out=out)
        return torch.addmm(self.linear_bias, self.x, self.linear_weight.t(), out=out)


class _Gradients(NamedTuple):
    """dx, dW, db or slices of them; those that nobody needs have no elements."""

    dx: Tensor
    dw: Tensor
    db: Tensor

    def of_tokens(self, start: int, stop: int) -> _Gradients:
        """What tokens [start, stop) write."""
        return self._replace(dx=self.dx[start:stop])

    def of_classes(self, first: int, last: int) -> _Gradients:
        """What classes [first, last) write."""
        return self._replace(dw=self.dw[first:last], db=self.db[first:last])

    def add(self, g: Tensor, part: _Problem, dx_begun: bool, dw_begun: bool) -> None:
        """dx (+)= G W, dW (+)= G^T x, db (+)= sum_n G_n: added where an earlier part was written."""
        if self.dx.numel():
            _multiply(g, part.linear_weight, self.dx, dx_begun)
        if self.dw.numel():
            _multiply(g.t(), part.x, self.dw, dw_begun)
        if self.db.numel():
            total = g.sum(0, dtype=self.db.dtype)
            self.db.add_(total) if dw_begun else self.db.copy_(total)


def _empty_gradients(
    x: Tensor, linear_weight: Tensor, dtypes: tuple[torch.dtype, torch.dtype], needs: Sequence[bool]
) -> _Gradients:
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes3 = (*dtypes, accumulator(x.dtype)[0])
    return _Gradients(
        *(
            torch.empty(shape if need else (0,), dtype=dtype, device=x.device)
            for shape, dtype, need in zip(shapes, dtypes3, needs, strict=True)
        )
    )


def _sum_dtypes(x: Tensor, linear_weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which dx and dW are summed and kept until they are scaled; no function of the number of tokens."""
    wide = accumulator(x.dtype)[0]
    classes, hidden = linear_weight.shape
    if configs.linear_cross_entropy_by_classes(hidden, classes, x.dtype):
        return wide, x.dtype
    # The largest fp16 is 65504: enough for one token's G W, whatever its loss's weight, only in fp32.
    return (wide if x.dtype == torch.float16 else x.dtype), wide


def _prepare(
    problem: _Problem, needs: Sequence[bool]
) -> tuple[_Problem, configs.LinearCrossEntropyPlan, Tensor, _Gradients]:
    """The problem in strides that products and kernels take, its plan, the logits' buffer, gradients to be written."""
    x, linear_weight = _matrix(problem.x), _matrix(problem.linear_weight)
    (tokens, hidden), classes = x.shape, linear_weight.shape[0]
    plan = configs.linear_cross_entropy_plan(tokens, hidden, classes, x.dtype, needs[1])
    grads = _empty_gradients(x, linear_weight, _sum_dtypes(x, linear_weight), needs)
    if tokens == 0:
        for grad in grads:
            grad.zero_()
    problem = problem._replace(x=x, linear_weight=linear_weight, target=problem.target.contiguous())
    return problem, plan, x.new_empty(plan.buffer_elements), grads


def _token_chunks(tokens: int, plan: configs.LinearCrossEntropyPlan) -> list[tuple[int, int]]:
    return [(start, min(start + plan.rows, tokens)) for start in range(0, tokens, max(1, plan.rows))]


def _gradients_by_classes(
    problem: _Problem,
    lse: Tensor,
    upstream: Tensor | None,
    plan: configs.LinearCrossEntropyPlan,
    buffer: Tensor,
    grads: _Gradients,
) -> None:
    """All gradients from lse, a block of classes at a time, its logits computed first."""
    rows = problem.linear_weight.shape[0]
    for first in range(0, rows, plan.classes):
        last = min(first + plan.classes, rows)
        block = problem.of_classes(first, last)
        logits = block.logits(buffer)
        counted = logits[:, : block.classes]
        inputs = (counted, problem.target, problem.weight, problem.options, lse, counted)
        launch_gradient(*inputs, upstream=upstream, first_class=first, classes=problem.classes)
        grads.of_classes(first, last).add(logits, block, dx_begun=first > 0, dw_begun=False)


def _mean_is_defined(problem: _Problem) -> Tensor | None:
    """A factor of every counted token's gradient under "mean": 1, or NaN where class weights sum to 0, as 0 / 0 is.

    Ignored tokens have none, so that with nothing counted all gradients stay 0. None: without weights it is always 1.
    """
    if problem.weight is None:
        return None
    target = problem.target.long()
    # Targets outside the classes raise, or give NaN, in the kernel.
    weights = problem.weight[target.clamp(0, problem.weight.shape[0] - 1)].to(accumulator(problem.x.dtype)[0])
    total = weights.masked_fill(target == problem.options.ignore_index, 0.0).sum()
    return torch.where(total == 0.0, torch.nan, 1.0).to(total.dtype)


@_without_autocast
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
    problem, plan, buffer, grads = _prepare(
        _Problem(x, linear_weight, linear_bias, target, weight, options, classes), needs
    )
    rows = torch.empty(ROW_VALUES, x.shape[0], dtype=accumulator(x.dtype)[0], device=x.device)
    in_one_pass = any(needs) and plan.mode == "tokens"
    by_weights = any(needs) and reduction == "mean" and num_items is None
    factor = _mean_is_defined(problem) if by_weights else None
    for start, stop in _token_chunks(x.shape[0], plan):
        chunk = problem.of_tokens(start, stop)
        logits = chunk.logits(buffer)
        counted = logits[:, :classes]
        gradient = counted if in_one_pass else None
        launch_rows(counted, chunk.target, weight, options, rows[:, start:stop], gradient, factor)
        if in_one_pass:
            grads.of_tokens(start, stop).add(logits, chunk, dx_begun=False, dw_begun=start > 0)
    if any(needs) and not in_one_pass:
        _gradients_by_classes(problem, rows[LSE], factor, plan, buffer, grads)
    lse = rows[LSE].clone() if save_lse else rows.new_empty(0)
    if reduction == "none":
        return rows[0].clone(), rows[1].clone(), rows.new_empty(0), *grads, lse
    return *launch_reduce(rows, reduction, num_items), *grads, lse


def _fake_forward(x: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    reduction, needs, save_lse = rest[4], rest[-2], rest[-1]
    rows = torch.empty(0, dtype=accumulator(x.dtype)[0], device=x.device)
    grads = _empty_gradients(x, linear_weight, _sum_dtypes(x, linear_weight), needs)
    shape, denominator = ((x.shape[0],), (0,)) if reduction == "none" else ((), ())
    lse = rows.new_empty((2, x.shape[0]) if save_lse else (0,))
    return rows.new_empty(shape), rows.new_empty(shape), rows.new_empty(denominator), *grads, lse


@_without_autocast
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
    problem, plan, buffer, grads = _prepare(
        _Problem(x, linear_weight, linear_bias, target, weight, options, classes), needs
    )
    if plan.mode == "classes":
        _gradients_by_classes(problem, lse, grad, plan, buffer, grads)
    for start, stop in _token_chunks(x.shape[0], plan) if plan.mode == "tokens" else ():
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
    dx, dw, db = _empty_gradients(x, linear_weight, (x.dtype, x.dtype), rest[-1])
    return dx, dw, db.to(x.dtype)


def _launch_scale(
    grad: Tensor, denominator: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dW, db) times grad / denominator, in `dtype`."""
    grad = grad.resolve_neg()
    scaled = _fake_scale(grad, denominator, dx, dw, db, dtype)
    for source, result in zip((dx, dw, db), scaled, strict=True):
        if source.numel() == 0:
            continue
        rows, columns = source.shape if source.dim() == 2 else (1, source.shape[0])
        launch(
            linear_cross_entropy_scale_kernel,
            (-(-source.numel() // configs.LINEAR_SCALE_BLOCK),),
            (source, grad, denominator, result, rows, columns),
            num_warps=configs.LINEAR_SCALE_WARPS,
            BLOCK=configs.LINEAR_SCALE_BLOCK,
            ACC=accumulator(denominator.dtype)[1],
        )
    return scaled


def _fake_scale(
    grad: Tensor, denominator: Tensor, dx: Tensor, dw: Tensor, db: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(source, dtype=dtype) for source in (dx, dw, db))  # type: ignore[return-value]


# Operators and autograd.


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
    _launch_scale,
    _fake_scale,
)


# Public function.


def _compute_dtype(input: Tensor) -> torch.dtype:
    """The dtype in which the reference's product would run: autocast's, where it is on and casts this tensor."""
    if autocast_is_on(input) and input.dtype in _KERNEL_DTYPES:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype


def _obstacle(
    num_classes: int | None,
    input: Any,
    linear_weight: Any,
    target: Any,
    linear_bias: Any,
    weight: Any,
    ignore_index: Any,
    *rest: Any,
) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to the reference and raise its errors."""
    tensors = [t for t in (input, linear_weight, linear_bias, target, weight) if t is not None]
    if target is None or not all(isinstance(t, Tensor) for t in tensors):
        return "an argument is not a tensor"
    for tensor in (input, linear_weight, linear_bias):
        if tensor is not None and tensor.dtype not in _KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
        if tensor is not None and _compute_dtype(tensor) != _compute_dtype(input):
            return f"dtypes {input.dtype} and {tensor.dtype}"
    classes = linear_weight.shape[0] if num_classes is None else num_classes
    return _shape_obstacle(input, linear_weight, target, linear_bias) or loss_obstacle(
        classes, input, target, weight, -100 if ignore_index is None else ignore_index, *rest
    )


def _shape_obstacle(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> str | None:
    if linear_weight.dim() != 2 or input.dim() not in (1, 2, 3) or input.shape[-1] != linear_weight.shape[1]:
        return f"shapes {tuple(input.shape)} and {tuple(linear_weight.shape)}"
    # A product with a single row or column is no matrix product to cuBLAS.
    if linear_weight.shape[0] < 2 or linear_weight.shape[1] < 2:
        return f"a head of shape {tuple(linear_weight.shape)}"
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:1]:
        return f"linear_bias of shape {tuple(linear_bias.shape)}"
    if target.dtype not in (torch.int64, torch.uint8):
        return f"targets of {target.dtype}"
    if target.shape != input.shape[:-1]:
        return f"targets of shape {tuple(target.shape)}"
    return None


def _check_num_classes(num_classes: int | None, linear_weight: Any, linear_bias: Tensor | None) -> None:
    """ValueError unless `num_classes` is None or cuts a plain matrix without a bias."""
    if num_classes is None:
        return
    rows = linear_weight.shape[0] if isinstance(linear_weight, Tensor) and linear_weight.dim() == 2 else 0
    if linear_bias is not None or type(num_classes) is not int or not 1 <= num_classes <= rows:
        raise ValueError(
            f"num_classes: got {num_classes!r} for a head of {rows} rows (with bias: {linear_bias is not None}); give "
            "1 to its rows and no linear_bias, or None for all"
        )


def _check_options(options: Any) -> None:
    """Raise AttributeError, PyTorch's own class, for what is none of its options."""
    if options is not None and not isinstance(options, _OPTIONS):
        raise AttributeError(f"options: got {options!r}; give a torch.nn.LinearCrossEntropyOptions, or None")


def _check_sharded(input: Any, linear_weight: Any) -> None:
    """Raise one clear error for a head that is spread over ranks while the input is not."""
    if not hasattr(linear_weight, "placements") or hasattr(input, "placements"):
        return
    raise ValueError(
        f"linear_weight: got a DTensor placed {linear_weight.placements} with a plain input; use"
        " fastlm_kernels.nn.LinearCrossEntropyLoss, which holds the head, and shard that module:"
        " its weight is then whole when the loss is computed"
    )


@with_kernel
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    num_classes: int | None = None,
) -> Any:
    """`torch.nn.functional.linear_cross_entropy` of torch 2.13, also on older versions, and for (B, T, D) too.

    input (D,), (N, D) or (B, T, D); linear_weight (C, D), or (C, d1, ..., D) with input (N, D); linear_bias (C,) or
    (C, d1, ...); target class indices (), (N,), (N, d1, ...), (B, T), or probabilities (C,), (N, C), (N, C, d1, ...),
    (B, T, C); weight (C,). ignore_index None means -100, and must be None with probabilities. Result and `z_loss`,
    `return_z_loss`, `softcap`, `num_items` as in `cross_entropy`: fp32 for fp16 and bf16.

    options: PyTorch's wish for a chunk size (`torch.nn.LinearCrossEntropyOptions`). It changes memory, never the
    result, and its combinations that PyTorch warns about and ignores are ignored: we choose the chunks ourselves.

    num_classes: rows of linear_weight from here on stand for no class. They must be 0 (not checked) and get gradients
    of 0: padding to a multiple that tensor cores like. None: every row is a class.

    Unlike PyTorch's, the kernels raise in a backward of the backward; and under reduction "none" changing `input` or
    `linear_weight` in place between forward and backward raises, while under "mean" and "sum" it changes nothing.

    A head sharded over ranks (a DTensor) with a plain input raises ValueError: `nn.LinearCrossEntropyLoss` holds the
    head and is what FSDP2 shards.
    """
    check_loss_keywords(z_loss, softcap, num_items, reduction)
    _check_options(options)
    _check_sharded(input, linear_weight)
    _check_num_classes(num_classes, linear_weight, linear_bias)
    obstacle = _obstacle(
        *(num_classes, input, linear_weight, target, linear_bias, weight),
        *(ignore_index, reduction, label_smoothing, num_items),
    )
    if not _runtime.choose(input, linear_weight, linear_bias, target, weight, obstacle=obstacle):
        return linear_cross_entropy_reference(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            return_z_loss=return_z_loss,
            softcap=softcap,
            num_items=num_items,
            num_classes=num_classes,
        )
    dtype = _compute_dtype(input)
    # Cast where autograd sees it; without autocast there is nothing to cast.
    x = (input if input.dim() == 2 else input.reshape(-1, input.shape[-1])).to(dtype)
    head = linear_weight.to(dtype)
    bias = None if linear_bias is None else linear_bias.to(dtype)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, head, bias)]
    in_forward = reduction != "none"
    loss, z, *_ = linear_cross_entropy_forward(
        *(x, head, bias, target.reshape(-1), weight, items_on_device(num_items, input.device), reduction),
        *(-100 if ignore_index is None else ignore_index, float(label_smoothing), float(z_loss)),
        *(None if softcap is None else float(softcap), head.shape[0] if num_classes is None else num_classes),
        [need and in_forward for need in wanted],
        any(wanted) and not in_forward,
    )
    if reduction == "none":
        loss, z = loss.view(target.shape), z.view(target.shape)
    return (loss, z) if return_z_loss else loss
