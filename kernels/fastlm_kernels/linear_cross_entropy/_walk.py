"""The walk over logits that are never all there: parts of the problem, and of the gradients that they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import configs
from .._rows import accumulator
from ..cross_entropy import Options, launch_gradient


class Problem(NamedTuple):
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

    def of_tokens(self, start: int, stop: int) -> Problem:
        """Tokens [start, stop) alone."""
        return self._replace(x=self.x[start:stop], target=self.target[start:stop])

    def of_classes(self, first: int, last: int) -> Problem:
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


class Gradients(NamedTuple):
    """dx, dW, db or slices of them; those that nobody needs have no elements."""

    dx: Tensor
    dw: Tensor
    db: Tensor

    def of_tokens(self, start: int, stop: int) -> Gradients:
        """What tokens [start, stop) write."""
        return self._replace(dx=self.dx[start:stop])

    def of_classes(self, first: int, last: int) -> Gradients:
        """What classes [first, last) write."""
        return self._replace(dw=self.dw[first:last], db=self.db[first:last])

    def add(self, g: Tensor, part: Problem, dx_begun: bool, dw_begun: bool) -> None:
        """dx (+)= G W, dW (+)= G^T x, db (+)= sum_n G_n: added where an earlier part was written."""
        if self.dx.numel():
            _multiply(g, part.linear_weight, self.dx, dx_begun)
        if self.dw.numel():
            _multiply(g.t(), part.x, self.dw, dw_begun)
        if self.db.numel():
            total = g.sum(0, dtype=self.db.dtype)
            self.db.add_(total) if dw_begun else self.db.copy_(total)


def empty_gradients(
    x: Tensor, linear_weight: Tensor, dtypes: tuple[torch.dtype, torch.dtype], needs: Sequence[bool]
) -> Gradients:
    shapes = (x.shape, linear_weight.shape, linear_weight.shape[:1])
    dtypes3 = (*dtypes, accumulator(x.dtype)[0])
    return Gradients(
        *(
            torch.empty(shape if need else (0,), dtype=dtype, device=x.device)
            for shape, dtype, need in zip(shapes, dtypes3, needs, strict=True)
        )
    )


def sum_dtypes(x: Tensor, linear_weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes in which dx and dW are summed and kept until they are scaled; no function of the number of tokens."""
    wide = accumulator(x.dtype)[0]
    classes, hidden = linear_weight.shape
    if configs.linear_cross_entropy_by_classes(hidden, classes, x.dtype):
        return wide, x.dtype
    # The largest fp16 is 65504: enough for one token's G W, whatever its loss's weight, only in fp32.
    return (wide if x.dtype == torch.float16 else x.dtype), wide


def prepare(
    problem: Problem, needs: Sequence[bool]
) -> tuple[Problem, configs.LinearCrossEntropyPlan, Tensor, Gradients]:
    """The problem in strides that products and kernels take, its plan, the logits' buffer, gradients to be written."""
    x, linear_weight = _matrix(problem.x), _matrix(problem.linear_weight)
    (tokens, hidden), classes = x.shape, linear_weight.shape[0]
    plan = configs.linear_cross_entropy_plan(tokens, hidden, classes, x.dtype, needs[1])
    grads = empty_gradients(x, linear_weight, sum_dtypes(x, linear_weight), needs)
    if tokens == 0:
        for grad in grads:
            grad.zero_()
    problem = problem._replace(x=x, linear_weight=linear_weight, target=problem.target.contiguous())
    return problem, plan, x.new_empty(plan.buffer_elements), grads


def token_chunks(tokens: int, plan: configs.LinearCrossEntropyPlan) -> list[tuple[int, int]]:
    return [(start, min(start + plan.rows, tokens)) for start in range(0, tokens, max(1, plan.rows))]


def gradients_by_classes(
    problem: Problem,
    lse: Tensor,
    upstream: Tensor | None,
    plan: configs.LinearCrossEntropyPlan,
    buffer: Tensor,
    grads: Gradients,
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


def mean_is_defined(problem: Problem) -> Tensor | None:
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


def _matrix(tensor: Tensor) -> Tensor:
    """The tensor if matrix products take its strides as they are, else a copy: once, not once a chunk."""
    rows, columns = tensor.stride()
    fits = (columns == 1 and rows >= tensor.shape[1]) or (rows == 1 and columns >= tensor.shape[0])
    return tensor if fits else tensor.contiguous()


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


def _sums_wider_than_products(tensor: Tensor) -> bool:
    """Whether products of 16-bit matrices may be written, and added up, in fp32: cuBLAS alone does that."""
    return tensor.is_cuda and torch.version.hip is None and not torch.cuda.tunable.is_enabled()
