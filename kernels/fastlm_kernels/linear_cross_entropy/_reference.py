"""The definition as a matrix product and cross-entropy, and what it asks of its arguments."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cross_entropy import cross_entropy_reference

# Younger than torch 2.11.
_OPTIONS = getattr(torch.nn, "LinearCrossEntropyOptions", ())


def check_options(options: Any) -> None:
    """Raise AttributeError, PyTorch's own class, for what is none of its options."""
    if options is not None and not isinstance(options, _OPTIONS):
        raise AttributeError(f"options: got {options!r}; give a torch.nn.LinearCrossEntropyOptions, or None")


def check_num_classes(num_classes: int | None, linear_weight: Any, linear_bias: Tensor | None) -> None:
    """ValueError unless `num_classes` is None or cuts a plain matrix without a bias."""
    if num_classes is None:
        return
    rows = linear_weight.shape[0] if isinstance(linear_weight, Tensor) and linear_weight.dim() == 2 else 0
    if linear_bias is not None or type(num_classes) is not int or not 1 <= num_classes <= rows:
        raise ValueError(
            f"num_classes: got {num_classes!r} for a head of {rows} rows (with bias: {linear_bias is not None}); give "
            "1 to its rows and no linear_bias, or None for all"
        )


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
    check_options(options)
    check_num_classes(num_classes, linear_weight, linear_bias)
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
