"""Linear cross-entropy: the head's matrix product and the loss in one function that never holds all logits.

With x (N, D) hidden states, W (V, D) the head, b its bias, and `cross_entropy`:

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

In order of reading: `_walk` (the parts of a call), `_scale` (a kernel and its launcher), `_operators` (forward and
backward, registration), `_reference` (the definition in PyTorch's operators), and here the public function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _runtime
from .._arguments import check_loss_keywords
from .._runtime import with_kernel
from ..cross_entropy import autocast_is_on, items_on_device, loss_obstacle
from ._operators import linear_cross_entropy_backward, linear_cross_entropy_forward, linear_cross_entropy_scale
from ._reference import check_num_classes, check_options, linear_cross_entropy_reference

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_scale",
]

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    check_options(options)
    _check_sharded(input, linear_weight)
    check_num_classes(num_classes, linear_weight, linear_bias)
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
