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

Bytes per logit, s each (2 in bf16): forward reads it, s; backward reads it and writes its gradient, 2 s. Saved: the
logits themselves, and two fp32 numbers a row. (PyTorch reads the logits, writes log-probabilities and saves them.)
Forward is two launches, rows and then their sum, a third past 32,768 rows, one under "none"; backward is one. (Label
smoothing adds the sum of the class weights to both, if there are any.) Nothing is copied but logits whose classes are
not adjacent, and (N, C, d1, ...), which becomes rows.

Forward: a row is one block, or walked in blocks with the log-sum-exp built up as it goes: every thread keeps the
largest of its logits and the sum of their powers, so that threads meet once a row. A thread's next 32 bytes in 16 bits
(64 in 32) are requested while it works on the last: 2 programs of 512 threads and 47 registers on a multiprocessor of
sm_90 have 32 KB on the way, in plain bf16, and a single one, where rows are few, 16 KB. About 9 instructions and one
power of two a logit; an H200's bandwidth leaves time for 12. The soft-cap takes two powers or reciprocals more, and is
then no longer bound by memory alone. Rows whose distance 16 does not divide (50257 classes) are read element by
element.

Backward, dl_v summed up with e = label_smoothing, C classes, W = sum_v w_v:

    dl_v = (1 - e) w_y (p_v - [v = y]) + (e / C) (W p_v - w_v) + 2 z_loss lse p_v,    p_v = exp(l_v - lse)

The loss is computed in fp32 and so is p - 1, from log(1 + the other classes' share): a token so confident that p rounds
to 1 keeps its loss and gradient to all digits. lse is saved as a sum of two numbers for that. Rows past 32,768 are
summed by several programs, then by one, always in the same order.

Ignored rows: their gradient is 0, without reading their logits; where those made lse NaN or infinite it is NaN, as
PyTorch's is. A target outside [0, C) is never an address: IndexError on a CPU, NaN loss and gradient on a GPU.

In order of reading: `_tiles` (what kernels share), `_forward`, `_reduce` and `_backward` (kernels and their launchers),
`_operators` (registration), `_reference` (the definition in PyTorch's operators), and here the public function;
`_launch` is what launchers share. linear_cross_entropy launches the kernels on chunks of logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from .._arguments import check_loss_keywords
from .._runtime import with_kernel
from ._backward import launch_gradient
from ._forward import launch_rows
from ._launch import LSE, ROW_VALUES, Options
from ._operators import cross_entropy_backward, cross_entropy_forward
from ._reduce import launch_reduce
from ._reference import cross_entropy_reference, legacy_reduction

__all__ = [
    "LSE",
    "ROW_VALUES",
    "Options",
    "autocast_is_on",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_reference",
    "items_on_device",
    "launch_gradient",
    "launch_reduce",
    "launch_rows",
    "loss_obstacle",
]

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def autocast_is_on(tensor: Tensor) -> bool:
    """Whether autocast is on where this tensor lies; asking that of a device without autocast is an error."""
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


def _obstacle(input: Any, target: Any, weight: Any, *rest: Any) -> str | None:
    """Why the kernels do not cover this call; malformed calls go to PyTorch's op and raise its errors."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor) or not isinstance(weight, (Tensor, type(None))):
        return "an argument is not a tensor"
    if input.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {input.dtype}"
    if input.dim() == 0 or target.shape != (*input.shape[:1], *input.shape[2:])[input.dim() == 1 :]:
        same = target.shape == input.shape
        return "targets are probabilities" if same else "the target's shape is not the input's without its classes"
    classes = input.shape[min(1, input.dim() - 1)]
    if classes == 0:
        return "no classes"
    if target.dtype != torch.int64 and (target.dtype != torch.uint8 or input.dim() > 2):
        return f"no kernel for targets of {target.dtype}"
    return loss_obstacle(classes, input, target, weight, *rest)


def loss_obstacle(
    classes: int,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: Any,
    reduction: Any,
    label_smoothing: Any,
    num_items: Any,
) -> str | None:
    """What both losses ask of their arguments; input is of a dtype with a kernel, target of int64 or uint8."""
    if not isinstance(ignore_index, (int, torch.SymInt)) or isinstance(ignore_index, bool):
        return "ignore_index is not an int"
    if not -(2**63) <= ignore_index < 2**63:
        return "ignore_index is no int64"
    if reduction not in ("none", "mean", "sum"):
        return f"reduction is {reduction!r}"
    if not isinstance(label_smoothing, (int, float)) or not 0.0 <= label_smoothing <= 1.0:
        return f"label_smoothing is {label_smoothing!r}"
    if label_smoothing and target.dtype == torch.uint8:
        # It takes ignore_index -100 for class 156, and with weights raises.
        return "PyTorch's label smoothing has answers of its own for uint8 targets"
    if isinstance(num_items, Tensor) and num_items.requires_grad:
        return "num_items requires a gradient"
    return _weight_obstacle(classes, input, weight)


def _weight_obstacle(classes: int, input: Tensor, weight: Tensor | None) -> str | None:
    if weight is None:
        return None
    if weight.shape != (classes,):
        return f"weight of shape {tuple(weight.shape)} for {classes} classes"
    if weight.requires_grad:
        return "weight requires a gradient"
    # Autocast brings both to fp32; without it PyTorch refuses.
    if weight.dtype != input.dtype and not (weight.dtype in _KERNEL_DTYPES and autocast_is_on(input)):
        return f"weight is {weight.dtype}, input {input.dtype}"
    return None


def items_on_device(num_items: int | Tensor | None, device: torch.device) -> Tensor | None:
    """num_items as a tensor beside the loss, without waiting: an int would compile a new graph for every batch."""
    if num_items is None or isinstance(num_items, Tensor):
        return num_items if num_items is None else num_items.to(device, non_blocking=True)
    return torch.full((), num_items, dtype=torch.int64, device=device)


@with_kernel
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
    inplace_backward: allows backward to overwrite `input` with its gradient, which saves their memory once; a second
        backward raises RuntimeError. Used in eager mode, by the kernels, for rows without gaps between their classes
        and without shared memory; PyTorch's operators bring the error alone, compiled code neither.

    Unlike PyTorch's, the kernels' backward reads `input` again: changing it in place between forward and backward
    raises RuntimeError; and a backward of the backward raises, where PyTorch's operators compute it.

    All targets ignored, or no rows: "mean" gives NaN, as PyTorch does, with gradients of exactly 0; with num_items 0.
    A target outside [0, C) raises IndexError on a CPU. Our options raise ValueError, the others PyTorch's errors.
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_reduction(size_average, reduce)
    check_loss_keywords(z_loss, softcap, num_items, reduction)
    obstacle = _obstacle(input, target, weight, ignore_index, reduction, label_smoothing, num_items)
    if not _runtime.choose(input, target, weight, obstacle=obstacle):
        return cross_entropy_reference(
            *(input, target, weight, None, ignore_index, None, reduction, label_smoothing),
            z_loss=z_loss,
            return_z_loss=return_z_loss,
            softcap=softcap,
            num_items=num_items,
            inplace_backward=inplace_backward,
        )
    logits = input.movedim(1, -1).flatten(0, -2) if input.dim() > 2 else input.view(-1, input.shape[-1])
    loss, z, _, _ = cross_entropy_forward(
        *(logits, target.reshape(-1), weight, items_on_device(num_items, input.device), reduction, ignore_index),
        *(float(label_smoothing), float(z_loss), None if softcap is None else float(softcap)),
        inplace_backward and not _runtime.capturing(input),
    )
    if reduction == "none":
        loss, z = loss.view(target.shape), z.view(target.shape)
    return (loss, z) if return_z_loss else loss
