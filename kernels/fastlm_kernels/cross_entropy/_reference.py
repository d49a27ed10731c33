"""The definition in PyTorch's operators: the path without a kernel, and the truth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from .._arguments import check_loss_keywords, soft_cap

_HALF = (torch.float16, torch.bfloat16)
SECOND_BACKWARD = (
    "cross_entropy(inplace_backward=True): second backward through one loss; the first may have overwritten the logits "
    "with their gradient. Use inplace_backward=False to keep the graph"
)


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """What PyTorch's old pair of arguments stands for, with PyTorch's warning."""
    return legacy_get_string(size_average, reduce)


# Dynamo calls it while it traces, as torch.compiler.assume_constant_result would have it: a string in its graph it
# refuses. That function itself loads the compiler.
legacy_reduction._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _BackwardOnce(torch.autograd.Function):
    """Identity whose backward may run a single time: what in-place backward promises, whoever computes it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.used = False
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.used:
            raise RuntimeError(SECOND_BACKWARD)
        ctx.used = True
        return grads[0]


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
        reduction = legacy_reduction(size_average, reduce)
    check_loss_keywords(z_loss, softcap, num_items, reduction)
    input, weight = _in_fp32(input, target, weight)
    if inplace_backward and input.requires_grad and not torch.compiler.is_compiling():
        input = _BackwardOnce.apply(input)  # pyright: ignore[reportAssignmentType]
    logits = soft_cap(input, softcap)
    # Whatever is no reduction stays, and PyTorch says so.
    torch_reduction = "sum" if num_items is not None and reduction == "mean" else reduction
    loss = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction=torch_reduction, label_smoothing=label_smoothing
    )
    if num_items is not None:
        loss = _over_items(loss, num_items)
    if not z_loss and not return_z_loss:
        return loss
    z = _z_part(logits, target, weight, ignore_index, reduction, z_loss, num_items)
    loss = loss + z if z_loss else loss
    return (loss, z.detach()) if return_z_loss else loss


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
    # uint8 would take -100 for 156.
    counted = target.long() != ignore_index
    # `where` last: an ignored token's gradient is an exact 0 even under an infinite upstream (0 tokens counted).
    return torch.where(counted, z_loss * lse.square(), 0.0), counted


def _denominator(tokens: Tensor, counted: Tensor | None, target: Tensor, weight: Tensor | None) -> Tensor | int:
    """What "mean" divides by: see the package's text."""
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
