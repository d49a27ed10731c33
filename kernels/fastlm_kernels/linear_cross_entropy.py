"""Linear cross-entropy: the head's matrix product and the loss in one function, so that no caller holds the logits.

With x (N, D) hidden states, W (V, D) the head, b its bias, and cross_entropy of its own file:

    logits = x W^T + b
    loss   = cross_entropy(logits, target)
    dx = G W,   dW = G^T x,   db = sum_n G_n         where G = dloss/dlogits, (N, V)

FLOPs: 2 N V D forward, 4 N V D backward. Bytes: x, W and their gradients once, and on this path the logits and their
log-probabilities too, N V elements each: they are what is saved for backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ._runtime import without_kernel
from .cross_entropy import cross_entropy


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
) -> Any:
    """`linear_cross_entropy` as matrix product and cross-entropy: the definition, and the path without a kernel."""
    _check_shapes(input, linear_weight, linear_bias)
    shape = target.shape
    batched = input.dim() == 3
    if batched:
        input, target = _flatten_tokens(input, target, linear_weight.shape[0])
    logits = _logits(input, linear_weight, linear_bias)
    if target.shape == logits.shape and ignore_index is not None:
        raise RuntimeError(
            f"ignore_index={ignore_index} with a target of the logits' shape {tuple(logits.shape)}: probabilities "
            "ignore nothing; leave ignore_index out, or give class indices"
        )
    loss = cross_entropy(
        logits,
        target,
        weight,
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        return_z_loss=return_z_loss,
        softcap=softcap,
        num_items=num_items,
    )
    if not batched or reduction != "none":
        return loss
    if isinstance(loss, tuple):
        return loss[0].view(shape[:2]), loss[1].view(shape[:2])
    return loss.view(shape[:2])


@without_kernel("linear_cross_entropy has no kernel yet: matrix product and cross_entropy")
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
) -> Any:
    """`torch.nn.functional.linear_cross_entropy` of torch 2.13, also on older versions, and for (B, T, D) too.

    input (D,), (N, D) or (B, T, D); linear_weight (C, D), or (C, d1, ..., D) with input (N, D); linear_bias (C,) or
    (C, d1, ...); target class indices (), (N,), (N, d1, ...), (B, T), or probabilities (C,), (N, C), (N, C, d1, ...),
    (B, T, C); weight (C,). ignore_index None means -100, and must be None with probabilities. Result and `z_loss`,
    `return_z_loss`, `softcap`, `num_items` as in `cross_entropy`: fp32 for fp16 and bf16.

    options: PyTorch's wish for a chunk size (`torch.nn.LinearCrossEntropyOptions`). It changes memory, never the
    result, and its combinations that PyTorch warns about and ignores are ignored: we choose the chunks ourselves.
    """
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
    )
