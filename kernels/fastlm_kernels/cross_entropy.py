"""Cross-entropy: softmax over the classes and the negative log-likelihood of the target, in one function.

With c = softcap, x the logits of one token, y its target, w the class weights:

    l   = c * tanh(x / c)                                     (l = x without a cap)
    lse = log sum_v exp(l_v)
    nll = w_y * (lse - l_y)                                   label smoothing mixes in mean_v w_v * (lse - l_v)
    loss_token = nll + z_loss * lse**2
    dloss/dl_v = w_y * (exp(l_v - lse) - [v = y]) + 2 * z_loss * lse * exp(l_v - lse)
    dl/dx      = 1 - (l / c)**2

"mean" divides the sum over the counted tokens by sum w_y (by the number of counted tokens without weights, by the
number of rows with probability targets); `num_items` replaces that denominator.

Bytes per logit: PyTorch's operators read the logits once and write log-probabilities, then read and write them again
in backward; those log-probabilities are what is saved. The loss is computed in fp32: half-precision logits are
converted first, so p - 1 of a confident token keeps its digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from ._arguments import check_coefficient, check_num_items, check_softcap, soft_cap
from ._runtime import without_kernel

_HALF = (torch.float16, torch.bfloat16)


class _BackwardOnce(torch.autograd.Function):
    """Identity whose backward may run a single time: what in-place backward promises, whoever computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.used = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.used:
            raise RuntimeError(
                "cross_entropy(inplace_backward=True): second backward through one loss; the first may have "
                "overwritten the logits with their gradient. Use inplace_backward=False to keep the graph"
            )
        ctx.used = True
        return grads[0]


def _in_fp32(input: Any, target: Any, weight: Any) -> tuple[Any, Any]:
    """Half-precision logits and weights as fp32; anything PyTorch is going to refuse is left for it to refuse."""
    if not isinstance(input, Tensor) or input.dtype not in _HALF:
        return input, weight
    if not isinstance(weight, Tensor):
        return input.float(), weight
    probabilities = isinstance(target, Tensor) and target.is_floating_point()
    same = weight.dtype == input.dtype
    if not same and not probabilities and not torch.is_autocast_enabled(input.device.type):
        return input, weight
    return input.float(), weight.float() if same else weight


def _z_tokens(logits: Tensor, target: Tensor, ignore_index: int, z_loss: float) -> tuple[Tensor, Tensor | None]:
    """z_loss * lse**2 of every token, 0 where ignored; and which tokens count (None: all, probability targets)."""
    lse = logits.logsumexp(1 if logits.dim() > 1 else 0)
    if target.shape == logits.shape:
        return z_loss * lse.square(), None
    counted = target != ignore_index
    # `where` last: an ignored token's gradient is an exact 0 even under an infinite upstream (0 tokens counted).
    return torch.where(counted, z_loss * lse.square(), 0.0), counted


def _denominator(tokens: Tensor, counted: Tensor | None, target: Tensor, weight: Tensor | None) -> Tensor | int:
    """What "mean" divides by: see the module's text."""
    if counted is None:
        return tokens.numel()
    if weight is None:
        return counted.sum()
    return torch.where(counted, weight[torch.where(counted, target, 0).long()], 0.0).sum()


def _z_part(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    z_loss: float,
    num_items: int | Tensor | None,
) -> Tensor:
    """The z term, reduced as the loss is."""
    tokens, counted = _z_tokens(logits, target, ignore_index, z_loss)
    if reduction == "none":
        return tokens
    total = tokens.sum()
    if num_items is not None:
        return _over_items(total, num_items)
    return total if reduction == "sum" else total / _denominator(tokens, counted, target, weight)


def _over_items(total: Tensor, num_items: int | Tensor) -> Tensor:
    """total / num_items; no items means nothing was counted: 0, not NaN."""
    if isinstance(num_items, Tensor):
        return total / num_items.to(total.device).clamp(min=1)
    return total / max(num_items, 1)


def cross_entropy_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
) -> Any:
    """`cross_entropy` in PyTorch's operators: the definition, and the path where no kernel runs."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    check_coefficient("z_loss", z_loss)
    check_softcap(softcap)
    check_num_items(num_items, reduction)
    input, weight = _in_fp32(input, target, weight)
    if inplace_backward and input.requires_grad and not torch.compiler.is_compiling():
        input = _BackwardOnce.apply(input)  # pyright: ignore[reportAssignmentType]
    logits = soft_cap(input, softcap)
    torch_reduction = "sum" if num_items is not None else reduction
    loss = F.cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=torch_reduction,
        label_smoothing=label_smoothing,
    )
    if num_items is not None:
        loss = _over_items(loss, num_items)
    if not z_loss and not return_z_loss:
        return loss
    z = _z_part(logits, target, weight, ignore_index, reduction, z_loss, num_items)
    loss = loss + z if z_loss else loss
    return (loss, z.detach()) if return_z_loss else loss


# Launchers. linear_cross_entropy uses them on chunks of logits.


@dataclass(frozen=True)
class Options:
    """What the kernels of one loss agree on; see the module's text."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


# Fp32 numbers a row, in this order: loss (z included), z, lse, what rounding took from lse, weight in the denominator.
ROW_VALUES = 5
LSE = slice(2, 4)


def launch_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    rows: Tensor,
    gradient: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """Fill rows (ROW_VALUES, M) from logits (M, C), adjacent columns; and the gradient (M, C), if one is given.

    target (M,) int64 or uint8, weight (C,) or None. `rows` may be a slice of a larger buffer, [:, first : first + M],
    with adjacent columns. The gradient is the loss's of each row by its logits, times `upstream` (M,) or 0-d if given,
    and divided by nothing; it may be the logits' own memory. On a CPU a target outside [0, C) raises IndexError.
    """
    raise NotImplementedError


def launch_reduce(rows: Tensor, reduction: str, num_items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, z, denominator), 0-d, of rows (ROW_VALUES, M) under "mean" or "sum"; num_items 0-d, on their device."""
    raise NotImplementedError


def launch_gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    lse: Tensor,
    gradient: Tensor,
    upstream: Tensor | None = None,
    denominator: Tensor | None = None,
    first_class: int = 0,
    classes: int | None = None,
) -> None:
    """gradient (M, n) = upstream / denominator * dloss/dlogits, for classes [first_class, first_class + n).

    logits (M, n) holds those classes alone, of `classes` in all (None: n). weight (classes,); lse (2, M) is
    rows[LSE]; upstream 0-d or (M,) of any stride, denominator 0-d, 1 where None. gradient may be the logits' memory.
    """
    raise NotImplementedError


@without_kernel("cross_entropy has no kernel yet: PyTorch's operator")
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    return_z_loss: bool = False,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    inplace_backward: bool = False,
) -> Any:
    """`torch.nn.functional.cross_entropy`, with the options of language-model training.

    input (C,), (N, C) or (N, C, d1, ...), any floating dtype; target class indices (), (N,), (N, d1, ...) of int64 or
    uint8, or probabilities of input's shape; weight (C,). Result: 0-d, or target's shape under reduction "none", in
    fp32 for fp16 and bf16 input (PyTorch: in input's dtype), else in input's dtype.

    z_loss: adds z_loss * lse**2 for each counted token (not scaled by `weight`), under the loss's own denominator.
    return_z_loss: returns (loss, z); z is the part of loss that z_loss added, detached, reduced as loss is.
    softcap: logits become softcap * tanh(input / softcap) first.
    num_items: the sum over the counted tokens is divided by it, under "mean" and "sum" alike; int or 0-d tensor. 0
        counts as 1, so that a batch with nothing to count gives 0. Accumulation passes the whole update's count.
    inplace_backward: allows backward to overwrite `input` with its gradient; a second backward raises RuntimeError.
        PyTorch's operators cannot make use of the permission, here it only brings the error, in eager mode alone.

    All targets ignored, or no rows: "mean" gives NaN, as PyTorch does, with gradients of exactly 0; with num_items 0.
    A target outside [0, C) raises IndexError on a CPU. Our options raise ValueError, the others PyTorch's errors.
    """
    return cross_entropy_reference(
        input,
        target,
        weight,
        size_average,
        ignore_index,
        reduce,
        reduction,
        label_smoothing,
        z_loss=z_loss,
        return_z_loss=return_z_loss,
        softcap=softcap,
        num_items=num_items,
        inplace_backward=inplace_backward,
    )
